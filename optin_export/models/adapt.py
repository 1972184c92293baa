"""Check and adapt a loaded module: plain float32 weights, in layers that the rest of the package can read."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from optin_export.errors import InputError


def checked(module: nn.Module, source: str) -> nn.Module:
    """The module without wrappers of `torch.compile`, on the CPU.

    Raises InputError for missing weights (meta device) and for weights that are quantised, or that have adapters
    that are not merged yet.
    """
    module = _uncompiled(module)
    for path, part in module.named_modules():
        _refuse_uninitialised(source, path, part)
        if _is_adapter(part):
            raise InputError(
                f"{source} has adapters that are not merged",
                f"'{path}' is a layer of PEFT ({type(part).__name__})",
                "save model.merge_and_unload() and use that",
            )
        if hasattr(part, "_packed_params") or hasattr(part, "qweight"):
            raise _quantised(source, path, type(part).__name__)
    for name, tensor in module.named_parameters():
        if tensor.is_meta:
            raise InputError(
                f"the weights of {source} are missing", f"{name} is on the meta device", "load the weights first"
            )
        kind = type(tensor.data)
        if kind is not torch.Tensor or not tensor.is_floating_point() or tensor.dtype.itemsize < 2:
            raise _quantised(source, name, f"{kind.__name__} of {str(tensor.dtype).removeprefix('torch.')}")
    return module.to("cpu")


def _is_adapter(part: nn.Module) -> bool:
    """Whether a module is a PEFT layer, or has low-rank factors and a weight. Other models have a `base_layer`."""
    of_peft = any(cls.__module__.partition(".")[0] == "peft" for cls in type(part).__mro__)
    return of_peft or (hasattr(part, "lora_A") and (hasattr(part, "lora_B") or hasattr(part, "base_layer")))


def _refuse_uninitialised(source: str, path: str, part: nn.Module) -> None:
    """Raises InputError for a layer of torch.nn.Lazy..., whose weights are created at its first call."""
    for name, tensor in (*part._parameters.items(), *part._buffers.items()):
        if isinstance(tensor, nn.UninitializedParameter | nn.UninitializedBuffer):
            raise InputError(
                f"the weights of {source} are missing",
                f"'{path}' is a {type(part).__name__}: its {name} has no shape before its first call",
                "call the model once with real inputs before the weights are loaded, or name the sizes",
            )


def _quantised(source: str, where: str, what: str) -> InputError:
    return InputError(
        f"the weights of {source} are quantised", f"'{where}' is a {what}", "use the model before it was quantised"
    )


def refuse_quantised_config(config: Any, source: str) -> None:
    """Raises InputError for a quantised transformers configuration, before the quantisation library is needed."""
    settings = getattr(config, "quantization_config", None)
    if settings is not None:
        method = settings.get("quant_method") if isinstance(settings, dict) else getattr(settings, "quant_method", None)
        raise _quantised(
            source, "config.json", f"configuration of {getattr(method, 'value', method) or 'quantisation'}"
        )


def _uncompiled(module: nn.Module) -> nn.Module:
    module = getattr(module, "_orig_mod", module)
    for path, part in list(module.named_modules()):
        original = getattr(part, "_orig_mod", None)
        if original is not None:
            module.set_submodule(path, original)
        if getattr(part, "_compiled_call_impl", None) is not None:  # `part.compile()` compiles in place
            part._compiled_call_impl = None
    return module


def readable(module: nn.Module) -> None:
    """Replace layers whose units the package cannot read by equivalent ones, in place.

    Used on loaded models and on models rebuilt from their architecture, so that both have the same names.
    """
    for path, part in list(module.named_modules()):
        kind = type(part).__name__
        if kind == "Conv1D" and type(part).__module__ == "transformers.pytorch_utils":
            module.set_submodule(path, _as_linear(part))
        elif kind == "MPNetSelfAttention":
            # A buffer, so that it is cut and saved with the heads.
            part.register_buffer("heads", torch.arange(part.num_attention_heads))
            part.register_forward_pre_hook(take_bias_of_heads)
        elif kind in ("T5Attention", "MT5Attention") and part.has_relative_attention_bias and not part.is_decoder:
            part.register_forward_pre_hook(pass_position_bias, with_kwargs=True)
        elif kind in ("LongT5LocalAttention", "LongT5TransientGlobalAttention") and part.has_relative_attention_bias:
            part.register_forward_pre_hook(pass_local_position_bias, with_kwargs=True)
    config = getattr(module, "config", None)
    if getattr(config, "use_cache", False):
        config.use_cache = False  # type: ignore[union-attr]  # what is shipped answers a prompt in one pass


def _as_linear(layer: Any) -> nn.Linear:
    """A transformers Conv1D (GPT-2) holds the transposed weight of a linear layer."""
    inputs, outputs = layer.weight.shape
    linear = nn.Linear(inputs, outputs, device="meta")
    linear.weight = nn.Parameter(layer.weight.detach().T.contiguous())
    linear.bias = nn.Parameter(layer.bias.detach())
    return linear


def take_bias_of_heads(attention: Any, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """(hidden states, mask, position bias [batch, heads of the unpruned model, tokens, tokens])."""
    hidden, mask, bias = args
    if bias is None or len(attention.heads) == bias.shape[1]:
        return None
    return hidden, mask, bias.index_select(1, attention.heads)


def refuse_other_task(module: Any, task: str) -> None:
    """Raises InputError for a module whose class has no output for the task, or does not read the task's data."""
    reads = getattr(module, "main_input_name", "input_ids")
    if task == "zero-shot-image-classification":
        why, fix = "only CLIP and SigLIP have such an output", "use one of these"
    elif task == "feature-extraction" and reads != "input_ids":
        why, fix = f"it reads {reads}, not text", "set model.task to a task of such a model"
    else:
        return
    raise InputError(f"a {type(module).__name__} cannot be used for {task}", why, fix)


def pass_position_bias(attention: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Let T5's first encoder block read the position bias of all heads as an argument, as the other blocks do.

    [1, heads, tokens, tokens], from attention(hidden states [batch, tokens, hidden], ..., position_bias).
    """
    if len(args) != 1 or kwargs.get("position_bias") is not None:
        return None
    tokens = args[0].shape[1]
    return args, {**kwargs, "position_bias": attention.compute_bias(tokens, tokens, args[0].device)}


def pass_local_position_bias(attention: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The same for LongT5, whose bias holds the mask too: [batch, blocks, heads, tokens of a block, keys of a block].

    From attention(hidden states [batch, tokens, hidden], mask=..., position_bias=...). Keys of a block are the tokens
    of three blocks and, with transient-global attention, the summaries of all blocks.
    """
    if len(args) != 1 or kwargs.get("position_bias") is not None:
        return None
    from transformers.models.longt5 import modeling_longt5 as longt5

    hidden, mask = args[0], kwargs.get("mask")
    bias = attention.compute_bias(attention.block_len)
    summarises = hasattr(attention, "global_block_size")
    if mask is not None:
        local = longt5._get_local_attention_mask(mask, attention.block_len, hidden.device) if summarises else mask
        bias = bias + torch.where(local > 0, 0.0, -1e10).transpose(1, 2)
    if summarises:
        mask = torch.ones(hidden.shape[:-1]) if mask is None else mask
        _, segments = longt5._make_global_fixed_block_ids(mask, attention.global_block_size)
        side = attention.compute_side_bias(mask, segments)
        side = longt5._split_into_blocks(side, attention.block_len, dim=-2).transpose(1, 2)
        bias = torch.cat([bias.expand(*side.shape[:2], *bias.shape[2:]), side], dim=-1)
    return args, {**kwargs, "position_bias": bias}
