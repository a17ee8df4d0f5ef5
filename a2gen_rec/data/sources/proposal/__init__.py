"""Proposal of a generic spec from a raw log (``a2gen spec``).

Everything here is a guess from names and values, and the proposed YAML says so. ``prepare`` never guesses: it reads the
spec that a person has checked.
"""

from a2gen_rec.data.sources.proposal.propose import Proposal, propose_spec

__all__ = ["Proposal", "propose_spec"]
