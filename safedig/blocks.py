"""Where tensors pass a block: one port for each point of each stream, by the kind of block. Data only."""

from dataclasses import dataclass, replace

NORM_ONLY = "only the norm before the MLP reads what passes here; the residual goes on without it"


@dataclass(frozen=True)
class Port:
    """How a site's tensor passes a module: as an argument, or (no argument) as its output or one element of it."""

    module: str = ""
    """Path from the block, or from the model for a site outside the blocks."""
    argument: str | int | None = None
    """Name in the signature of `forward`; a number for modules whose signatures differ and that get it by position."""
    element: int | None = None
    part: str = ""
    """`img` or `txt` where the tensor is a joint sequence and only this part of it is meant."""
    width: str = ""
    """Attribute of the block or the model that says how wide the vectors are; empty: as wide as the architecture's."""
    unless: str = ""
    """Attribute of the block that, if set, keeps the tensor from passing here whole."""
    read_only: str = ""
    """Why an edit here would not do what the name promises; empty: it can be edited."""


Points = dict[str, Port]
"""`stream.point` → port, in the order of the computation."""


def on(stream: str, points: Points) -> Points:
    """A tensor that is all of one stream."""
    return {f"{stream}.{point}": port for point, port in points.items()}


def parts(points: Points) -> Points:
    """A joint tensor can be met whole, or only its text or its image."""
    return {
        f"{stream}.{point}": replace(port, part="" if stream == "joint" else stream)
        for point, port in points.items()
        for stream in ("txt", "img", "joint")
    }


def in_turn(x: str, attn: str, norm: str, mlp: str, attn2: str = "", read_only: str = NORM_ONLY) -> Points:
    """One tensor `x` through a block that first attends and then applies its MLP."""
    between = {"attn2_out": Port(attn2)} if attn2 else {}
    return {
        "resid_pre": Port(argument=x),
        "attn_out": Port(attn),
        **between,
        "resid_mid": Port(norm, argument=0, read_only=read_only),
        "mlp_out": Port(mlp, unless="_chunk_size"),
        "resid_post": Port(),
    }


def in_pairs(norm: tuple[str, str], mlp: tuple[str, str], read_only: str = NORM_ONLY) -> Points:
    """Text and image side by side: the block returns (txt, img), its attention (img, txt)."""
    return {
        "txt.resid_pre": Port(argument="encoder_hidden_states"),
        "img.resid_pre": Port(argument="hidden_states"),
        "txt.attn_out": Port("attn", element=1),
        "img.attn_out": Port("attn", element=0),
        "img.attn2_out": Port("attn2"),
        "txt.resid_mid": Port(norm[0], argument=0, read_only=read_only),
        "img.resid_mid": Port(norm[1], argument=0, read_only=read_only),
        "txt.mlp_out": Port(mlp[0], unless="_chunk_size"),
        "img.mlp_out": Port(mlp[1], unless="_chunk_size"),
        "txt.resid_post": Port(element=0, unless="context_pre_only"),
        "img.resid_post": Port(element=1),
    }


MMDIT = in_pairs(("norm2_context", "norm2"), ("ff_context", "ff"))
QWEN = in_pairs(("txt_norm2", "img_norm2"), ("txt_mlp", "img_mlp"))
# In AuraFlow the norm is all that reads the sum of residual and attention: the MLP is added to what came in.
AURA_PAIRS = in_pairs(("norm2_context", "norm2"), ("ff_context", "ff"), read_only="")
AURA_SINGLE = parts(in_turn("hidden_states", "attn", "norm2", "ff", read_only=""))

_PARALLEL = {
    "attn_heads": Port("attn"),
    "mlp_hidden": Port("act_mlp", width="proj_mlp.out_features"),
    "branch_out": Port("proj_out"),
}
FLUX_SINGLE = parts(_PARALLEL) | {"txt.resid_post": Port(element=0), "img.resid_post": Port(element=1)}
CHROMA_SINGLE = parts({**_PARALLEL, "resid_post": Port()})
# In Flux2 the heads are put before the MLP's hidden layer inside the attention's processor: no module passes them.
FLUX2_SINGLE = parts(
    {
        "mlp_hidden": Port("attn.mlp_act_fn", width="attn.mlp_hidden_dim"),
        "branch_out": Port("attn"),
        "resid_post": Port(),
    }
)
LUMINA = in_turn("hidden_states", "attn", "ffn_norm1", "feed_forward")
Z_IMAGE = in_turn("x", "attention", "ffn_norm1", "feed_forward")
CROSS = on("img", in_turn("hidden_states", "attn1", "norm2", "ff", attn2="attn2"))
