"""The embedded tiny world: scenes of pictograms, trained pipelines that draw them, and a judge that reads them."""

from .judge import judge
from .prompting import prompts

__all__ = ["judge", "prompts"]
