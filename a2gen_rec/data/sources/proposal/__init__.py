"""Proposal of a generic spec from a raw log (``a2gen spec``).

All modules guess from names and values, and comments in the proposed YAML mark the guesses. ``prepare`` never guesses:
it reads the spec that a person has checked.
"""

from a2gen_rec.data.sources.proposal.propose import Proposal, propose_spec

__all__ = ["Proposal", "propose_spec"]
