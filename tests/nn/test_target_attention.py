"""Target attention against PyTorch's attention with one target at a time."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from a2gen_rec.nn.encoder import WindowLayout
from a2gen_rec.nn.target_attention import TargetAttention
from a2gen_rec.utils.jagged import jagged_positions

HEADS, DIM = 2, 4


def test_equals_one_target_at_a_time() -> None:
    torch.manual_seed(0)
    module = TargetAttention(7, 5, DIM, HEADS, recency_buckets=6, match_features=2).double()
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    rng = torch.Generator().manual_seed(1)
    lengths, targets = torch.tensor([5, 2, 7]), torch.tensor([2, 1, 3])
    row, column = jagged_positions(lengths)
    target_row, target_column = jagged_positions(targets)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    tokens, target = random(14, 7), random(6, 5)
    visible = torch.rand(3, 3, 7, generator=rng) < 0.6
    visible &= (torch.arange(7) < lengths[:, None])[:, None]
    visible[0, 1] = False
    recency = torch.randint(6, (3, 3, 7), generator=rng)
    matches = torch.rand(3, 2, 3, 7, generator=rng) < 0.5
    layout = WindowLayout(row, column, (3, 7), target_row, target_column, (3, 3), visible, recency, matches)
    results = module(tokens, target, layout)
    for t in range(6):
        w, position = int(target_row[t]), int(target_column[t])
        keys = [i for i in range(14) if row[i] == w and visible[w, position, column[i]]]
        if not keys:
            assert not results[t].any()
            continue
        x = tokens[keys]
        query = module.query(target[t]).view(HEADS, 1, -1)
        key, value = (of(x).view(len(keys), HEADS, -1).transpose(0, 1) for of in (module.key, module.value))
        shared = matches[w, :, position, column[keys]].T.double()
        bias = (module.recency(recency[w, position, column[keys]]) + module.match(shared)).T[:, None]
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        torch.testing.assert_close(results[t], module.output(attended.flatten()), rtol=1e-9, atol=1e-9)
    assert not visible[0, 1].any()
