"""What should pass each point of a block, worked out from the block's submodules by the papers' formulas: no hooks.

A block's arguments are taken by standing in for its `forward`, which hooks do not touch.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

Points = dict[str, Tensor]


@contextmanager
def arguments_of(modules: dict[str, Any]) -> Iterator[dict[str, tuple[tuple, dict]]]:
    """The arguments of the last call of each module."""
    taken = {}

    def stand_in(name, forward):
        def noting(*args, **kwargs):
            taken[name] = (args, kwargs)
            return forward(*args, **kwargs)

        return noting

    for name, module in modules.items():
        module.forward = stand_in(name, module.forward)
    try:
        yield taken
    finally:
        for module in modules.values():
            del module.forward


def _adapted(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return x * (1 + scale[:, None]) + shift[:, None]


def _stream(name: str, pre: Tensor, attn: Tensor, mid: Tensor, mlp: Tensor, post: Tensor) -> Points:
    points = {"resid_pre": pre, "attn_out": attn, "resid_mid": mid, "mlp_out": mlp, "resid_post": post}
    return {f"{name}.{point}": x for point, x in points.items()}


def mmdit(block, hidden_states, encoder_hidden_states, temb, image_rotary_emb=None, **_) -> Points:
    """FLUX, Chroma and SD3: adaLN-zero, joint attention, gated residual, adapted norm, MLP, gated residual."""
    img, txt, halves = hidden_states, encoder_hidden_states, (temb, temb)
    if "Chroma" in type(block).__name__:
        halves = (temb[:, :6], temb[:, 6:])
    last = getattr(block, "context_pre_only", False)
    x, gate, shift, scale, gate_mlp, *dual = block.norm1(img, emb=halves[0])
    if last:
        c, c_mods = block.norm1_context(txt, halves[1]), None
    else:
        c, *c_mods = block.norm1_context(txt, emb=halves[1])
    rope = {} if image_rotary_emb is None else {"image_rotary_emb": image_rotary_emb}
    attn, c_attn = block.attn(hidden_states=x, encoder_hidden_states=c, **rope)
    mid, extra = img + gate[:, None] * attn, {}
    if dual:
        extra["img.attn2_out"] = block.attn2(hidden_states=dual[0])
        mid = mid + dual[1][:, None] * extra["img.attn2_out"]
    mlp = block.ff(_adapted(block.norm2(mid), scale, shift))
    found = _stream("img", img, attn, mid, mlp, mid + gate_mlp[:, None] * mlp) | extra
    if c_mods is None:
        return found | {"txt.resid_pre": txt, "txt.attn_out": c_attn}
    c_gate, c_shift, c_scale, c_gate_mlp = c_mods
    c_mid = txt + c_gate[:, None] * c_attn
    c_mlp = block.ff_context(_adapted(block.norm2_context(c_mid), c_scale, c_shift))
    return found | _stream("txt", txt, c_attn, c_mid, c_mlp, c_mid + c_gate_mlp[:, None] * c_mlp)


def aura(block, hidden_states, encoder_hidden_states, temb, **_) -> Points:
    """AuraFlow: as above, but the MLP is added to what came in, without the attention."""
    attn = mods = None
    found, normed = {}, []
    for stream, x in (("", hidden_states), ("_context", encoder_hidden_states)):
        y, *mods = getattr(block, f"norm1{stream}")(x, emb=temb)
        normed.append((x, y, mods))
    attn = block.attn(hidden_states=normed[0][1], encoder_hidden_states=normed[1][1])
    for name, stream, (x, _, mods), out in zip(("img", "txt"), ("", "_context"), normed, attn, strict=True):
        gate, shift, scale, gate_mlp = mods
        mid = x + gate[:, None] * out
        mlp = getattr(block, f"ff{stream}")(_adapted(getattr(block, f"norm2{stream}")(mid), scale, shift))
        found |= _stream(name, x, out, mid, mlp, x + gate_mlp[:, None] * mlp)
    return found


def aura_single(block, hidden_states, temb, **_) -> Points:
    x, gate, shift, scale, gate_mlp = block.norm1(hidden_states, emb=temb)
    attn = block.attn(hidden_states=x)
    mid = hidden_states + gate[:, None] * attn
    mlp = block.ff(_adapted(block.norm2(mid), scale, shift))
    return _stream("joint", hidden_states, attn, mid, mlp, hidden_states + gate_mlp[:, None] * mlp)


def qwen(
    block, hidden_states, encoder_hidden_states, encoder_hidden_states_mask, temb, image_rotary_emb, **_
) -> Points:
    found, parts = {}, {}
    for name, x in (("img", hidden_states), ("txt", encoder_hidden_states)):
        mods = [mod[:, None] for mod in getattr(block, f"{name}_mod")(temb).chunk(6, dim=-1)]
        parts[name] = (x, getattr(block, f"{name}_norm1")(x) * (1 + mods[1]) + mods[0], mods)
    attn = block.attn(
        hidden_states=parts["img"][1],
        encoder_hidden_states=parts["txt"][1],
        encoder_hidden_states_mask=encoder_hidden_states_mask,
        image_rotary_emb=image_rotary_emb,
    )
    for name, out in zip(("img", "txt"), attn, strict=True):
        x, _, (_, _, gate, shift, scale, gate_mlp) = parts[name]
        mid = x + gate * out
        mlp = getattr(block, f"{name}_mlp")(getattr(block, f"{name}_norm2")(mid) * (1 + scale) + shift)
        found |= _stream(name, x, out, mid, mlp, mid + gate_mlp * mlp)
    return found


def flux2(block, hidden_states, encoder_hidden_states, temb_mod_img, temb_mod_txt, image_rotary_emb, **_) -> Points:
    found, parts = {}, {}
    for name, end, x, mod in (
        ("img", "", hidden_states, temb_mod_img),
        ("txt", "_context", encoder_hidden_states, temb_mod_txt),
    ):
        mods = [one[:, None] for one in mod.chunk(6, dim=-1)]
        parts[name] = (end, x, getattr(block, f"norm1{end}")(x) * (1 + mods[1]) + mods[0], mods)
    attn = block.attn(
        hidden_states=parts["img"][2], encoder_hidden_states=parts["txt"][2], image_rotary_emb=image_rotary_emb
    )
    for name, out in zip(("img", "txt"), attn, strict=True):
        end, x, _, (_, _, gate, shift, scale, gate_mlp) = parts[name]
        mid = x + gate * out
        mlp = getattr(block, f"ff{end}")(getattr(block, f"norm2{end}")(mid) * (1 + scale) + shift)
        found |= _stream(name, x, out, mid, mlp, mid + gate_mlp * mlp)
    return found


def flux2_single(block, hidden_states, encoder_hidden_states, temb_mod, image_rotary_emb, **_) -> Points:
    """The hidden layer of the MLP is the last part of the one projection in, through a gate."""
    shift, scale, gate = (one[:, None] for one in temb_mod.chunk(3, dim=-1))
    x = block.norm(hidden_states) * (1 + scale) + shift
    first, second = block.attn.to_qkv_mlp_proj(x)[..., 3 * block.attn.inner_dim :].chunk(2, dim=-1)
    out = block.attn(hidden_states=x, image_rotary_emb=image_rotary_emb)
    return {
        "joint.mlp_hidden": torch.nn.functional.silu(first) * second,
        "joint.branch_out": out,
        "joint.resid_post": hidden_states + gate * out,
    }


def flux_single(block, hidden_states, temb, image_rotary_emb, encoder_hidden_states=None, **_) -> Points:
    """FLUX gives text and image apart and takes them so, Chroma as one."""
    x = hidden_states if encoder_hidden_states is None else torch.cat([encoder_hidden_states, hidden_states], dim=1)
    normed, gate = block.norm(x, emb=temb)
    heads = block.attn(hidden_states=normed, image_rotary_emb=image_rotary_emb)
    hidden = block.act_mlp(block.proj_mlp(normed))
    out = block.proj_out(torch.cat([heads, hidden], dim=2))
    post, found = x + gate[:, None] * out, {}
    if encoder_hidden_states is None:
        found["joint.resid_post"] = post
    else:
        count = encoder_hidden_states.shape[1]
        found |= {"txt.resid_post": post[:, :count], "img.resid_post": post[:, count:]}
    return found | {"joint.attn_heads": heads, "joint.mlp_hidden": hidden, "joint.branch_out": out}


def lumina2(block, x, attention_mask, image_rotary_emb, temb=None) -> Points:
    if temb is None:
        y, mods = block.norm1(x), (torch.tensor(1.0), torch.tensor(0.0), torch.tensor(1.0))
    else:
        y, gate, scale, gate_mlp = block.norm1(x, temb)
        mods = (gate[:, None].tanh(), scale[:, None], gate_mlp[:, None].tanh())
    attn = block.attn(y, encoder_hidden_states=y, attention_mask=attention_mask, image_rotary_emb=image_rotary_emb)
    mid = x + mods[0] * block.norm2(attn)
    mlp = block.feed_forward(block.ffn_norm1(mid) * (1 + mods[1]))
    return _stream("joint", x, attn, mid, mlp, mid + mods[2] * block.ffn_norm2(mlp))


def z_image(block, x, attn_mask, freqs_cis, adaln_input=None, *_) -> Points:
    scale, gate, scale_mlp, gate_mlp = (torch.tensor(value) for value in (0.0, 1.0, 0.0, 1.0))
    if block.modulation:
        scale, gate, scale_mlp, gate_mlp = block.adaLN_modulation(adaln_input)[:, None].chunk(4, dim=2)
        gate, gate_mlp = gate.tanh(), gate_mlp.tanh()
    attn = block.attention(block.attention_norm1(x) * (1 + scale), attention_mask=attn_mask, freqs_cis=freqs_cis)
    mid = x + gate * block.attention_norm2(attn)
    mlp = block.feed_forward(block.ffn_norm1(mid) * (1 + scale_mlp))
    return _stream("joint", x, attn, mid, mlp, mid + gate_mlp * block.ffn_norm2(mlp))


def cross(
    block,
    x,
    attention_mask=None,
    encoder_hidden_states=None,
    encoder_attention_mask=None,
    timestep=None,
    height=None,
    width=None,
    **_,
) -> Points:
    """PixArt and Sana: self-attention, cross-attention on the text, MLP (convolutions over the image in Sana)."""
    mods = (block.scale_shift_table[None] + timestep.reshape(len(x), 6, -1)).chunk(6, dim=1)
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = mods
    attn = block.attn1(block.norm1(x) * (1 + scale) + shift)
    mid = x + gate * attn
    attn2 = block.attn2(mid, encoder_hidden_states=encoder_hidden_states, attention_mask=encoder_attention_mask)
    mid = mid + attn2
    y = block.norm2(mid) * (1 + scale_mlp) + shift_mlp
    mlp = block.ff(y) if height is None else _flat(block.ff(y.unflatten(1, (height, width)).permute(0, 3, 1, 2)))
    return _stream("img", x, attn, mid, mlp, mid + gate_mlp * mlp) | {"img.attn2_out": attn2}


def _flat(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)


BLOCKS: dict[str, Callable[..., Points]] = {
    "FluxTransformerBlock": mmdit,
    "FluxSingleTransformerBlock": flux_single,
    "JointTransformerBlock": mmdit,
    "ChromaTransformerBlock": mmdit,
    "ChromaSingleTransformerBlock": flux_single,
    "Flux2TransformerBlock": flux2,
    "Flux2SingleTransformerBlock": flux2_single,
    "QwenImageTransformerBlock": qwen,
    "ZImageTransformerBlock": z_image,
    "AuraFlowJointTransformerBlock": aura,
    "AuraFlowSingleTransformerBlock": aura_single,
    "Lumina2TransformerBlock": lumina2,
    "BasicTransformerBlock": cross,
    "SanaTransformerBlock": cross,
}
