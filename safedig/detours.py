"""What would make a model run around hooks: compiled graphs, replayed steps, and calls that cannot be followed."""

import re
from typing import Any

from torch import nn

from .config import UsageError
from .sites import Site, component, transformer

# Diffusers' names for the hooks that replay a block's old output or skip it, and our hooks with it.
_STEP_CACHES = re.compile("fbc|mag_cache|sea_cache|taylorseer|faster_cache|pyramid_attention|text_kv|layer_skip")


def may_have_graphs(pipe: Any, name: str) -> bool:
    model = component(pipe, name)
    compiled = ("_orig_mod" in part._modules or vars(part).get("_compiled_call_impl") for part in model.modules())
    return getattr(pipe, name) is not model or any(compiled)


def drop_compiled_graphs() -> None:
    """torch.compile skips hooks that a graph has not seen, by default and silently."""
    import torch._dynamo

    torch._dynamo.config.skip_nnmodule_hook_guards = False
    torch.compiler.reset()


def refuse_checkpointing(model: nn.Module, site: Site) -> None:
    """What is computed anew for the gradients passes the site again, at no step: the function is not run then."""
    if any(getattr(part, "gradient_checkpointing", False) for part in model.modules()):
        raise UsageError(
            f"Gradient checkpointing computes what follows '{site}' anew without the edit, and the gradients would be "
            f"wrong: turn it off on pipe.{site.component}, or draw under torch.no_grad()."
        )


def refuse_unheard(pipe: Any) -> None:
    """A call of the pipeline is followed by the methods that it calls on its way."""
    for name in ("check_inputs", "encode_prompt", "maybe_free_model_hooks"):
        if not hasattr(pipe, name):
            raise UsageError(
                f"A {type(pipe).__name__} has no {name}(), by which a call of it would be followed: what passes its "
                "sites cannot be recorded or steered with certainty."
            )


def refuse_step_caches(pipe: Any) -> None:
    for module in transformer(pipe).modules():
        for name in getattr(vars(module).get("_diffusers_hook"), "hooks", {}):
            if _STEP_CACHES.match(name):
                raise UsageError(
                    f"The transformer has the step cache '{name}', which replays old activations past the hooks: "
                    "call pipe.transformer.disable_cache() first, or load the pipeline anew where it has none."
                )
