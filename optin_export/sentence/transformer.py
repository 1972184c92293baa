"""The first module, the Transformer: where it is, and how its texts are cut and tokenised."""

from __future__ import annotations

from typing import Any

from optin_export.errors import InputError
from optin_export.sentence.files import Files
from optin_export.sentence.modules import refusal

#: Where the transformer's own settings are; the library looks for them in this order.
_TRANSFORMER_FILES = tuple(
    f"sentence_{name}_config.json"
    for name in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
#: Settings of the transformer that do not change what it computes in float32.
_HARMLESS = ("unpad_inputs", "query_length", "document_length", "query_expansion", "module_output_name")
_HARMLESS_ARGS = ("torch_dtype", "dtype", "attn_implementation", "use_safetensors", "low_cpu_mem_usage", "device_map")


def read_transformer(files: Files, listed: list[tuple[str, str]], task: str) -> dict[str, Any]:
    """The fields of a SentenceFolder that its first module decides."""
    if not listed or listed[0][0] != "Transformer":
        kind = listed[0][0] if listed else "none"
        raise refusal(files.name, kind, "the first module must be a Transformer")
    path = listed[0][1]
    candidates = (files.settings(f"{path}/{name}" if path else name) for name in _TRANSFORMER_FILES)
    settings = dict(next((one for one in candidates if one), {}))

    def refused(what: str, why: str) -> InputError:
        return refusal(files.name, f"Transformer ({what})", why)

    given_task = settings.pop("transformer_task", task)
    if given_task != task:
        raise refused(f"transformer_task {given_task}", f"only {task} makes this kind of output")
    modalities = settings.pop("modality_config", None) or {}
    if "message" in modalities:
        raise refused("chat template", "its texts are rendered as chat messages before they are tokenised")
    wanted = "last_hidden_state" if task == "feature-extraction" else "logits"
    text = modalities.get("text", {"method": "forward", "method_output_name": wanted})
    if text.get("method") != "forward" or text.get("method_output_name") != wanted:
        raise refused("modality_config", f"its text output is not {wanted} of forward()")
    args = {}
    for new, old in (("model", "model"), ("processor", "tokenizer"), ("config", "config")):
        args[new] = {**settings.pop(f"{old}_args", {}), **settings.pop(f"{new}_kwargs", {})}
        args[new].pop("trust_remote_code", None)
    unknown = next((key for key in args["model"] if key not in _HARMLESS_ARGS), None)
    if unknown is not None:
        raise refused(f"model_kwargs.{unknown}", "that argument is not passed on")
    length, lower = settings.pop("max_seq_length", None), bool(settings.pop("do_lower_case", False))
    processing = dict(settings.pop("processing_kwargs", None) or {})
    text_options = dict(processing.pop("text", None) or {})
    # An option of every call goes before the tokenizer's own length.
    longest = text_options.pop("max_length", None)
    if text_options.pop("padding", True) is not True:
        raise refused("processing_kwargs", "texts are padded to another length than the longest")
    if text_options.pop("truncation", True) not in (True, "longest_first") or text_options or any(processing.values()):
        raise refused("processing_kwargs", "these options of the tokenizer are not known here")
    strange = next((key for key in settings if key not in _HARMLESS), None)
    if strange is not None:
        raise refused(strange, "that setting is not known here")
    given = longest or args["processor"].pop("model_max_length", None) or length
    if not isinstance(given, int | None) or isinstance(given, bool) or (given is not None and given < 1):
        raise refused("max_seq_length", f"{given!r} is no number of tokens")
    return {
        "subfolder": path,
        "max_length": given,
        "lower": lower,
        "config_args": args["config"],
        "tokenizer_args": args["processor"],
    }
