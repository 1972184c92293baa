"""`ship.config`: merged into config.pbtxt as Triton's protobuf says, or refused with the reason."""

from __future__ import annotations

from typing import Any

import pytest

from optin_export.errors import InputError
from optin_export.ship.config import ModelSpec, config_text, read_config
from optin_export.ship.own_config import check_own, server_arguments
from optin_export.ship.signature import Signature, Tensor

pytest.importorskip("tritonclient.grpc")
TOKENS = Signature((Tensor("input_ids", "TYPE_INT64", (-1, -1)),), (Tensor("logits", "TYPE_FP32", (-1, 5)),))
OWN: dict[str, Any] = {
    "dynamic_batching": {
        "preferred_batch_size": [4],
        "priority_levels": 2,
        "default_priority_level": 2,
        "default_queue_policy": {"default_timeout_microseconds": 50000, "max_queue_size": 64},
    },
    "instance_group": [{"count": 2, "kind": "KIND_CPU", "rate_limiter": {"resources": [{"name": "R", "count": 1}]}}],
    "response_cache": {"enable": True},
    "parameters": {"mine": {"string_value": "x"}},
}
TEXT = """dynamic_batching { preferred_batch_size: 4 priority_levels: 2 default_priority_level: 2
  default_queue_policy { default_timeout_microseconds: 50000 max_queue_size: 64 } }
instance_group { count: 2 kind: KIND_CPU rate_limiter { resources { name: "R" count: 1 } } }
response_cache { enable: true } parameters { key: "mine" value { string_value: "x" } }"""


@pytest.mark.parametrize("own", [OWN, TEXT], ids=["mapping", "text"])
def test_values_and_lists_replace_ours_and_sections_are_merged(own: Any) -> None:
    spec = ModelSpec("m", "onnxruntime", TOKENS, (1, 4, 8), parameters={"ours": "y"}, own=own)
    config = read_config(config_text(spec))
    batcher = config.dynamic_batching
    assert list(batcher.preferred_batch_size) == [4] and batcher.max_queue_delay_microseconds == 100
    assert batcher.default_queue_policy.max_queue_size == 64 and batcher.priority_levels == 2
    assert [group.count for group in config.instance_group] == [2] and config.response_cache.enable
    assert {name: value.string_value for name, value in config.parameters.items()} == {"ours": "y", "mine": "x"}
    assert config.max_batch_size == 8 and config.name == "m"
    assert server_arguments(own) == ("--cache-config=local,size=104857600", "--rate-limit=execution_count")
    assert server_arguments(None) == ()


@pytest.mark.parametrize(
    ("own", "says"),
    [
        ({"dynamic_batchin": {}}, "ModelConfig has no field 'dynamic_batchin': did you mean dynamic_batching"),
        (
            {"dynamic_batching": {"default_queue_policy": {"max_queue": 3}}},
            "ModelQueuePolicy has no field 'max_queue': did you mean max_queue_size",
        ),
        ("dynamic_batching { prefered_batch_size: 4 }", "did you mean preferred_batch_size"),
        ({"response_cache": {"enable": "perhaps"}}, "not a part of a config.pbtxt"),
        ({"instance_group": {"count": 1}}, "not a part of a config.pbtxt"),
        ("response_cache {", "not a part of a config.pbtxt"),
        ({"backend": "python"}, "cannot set backend: it follows from ship.backend"),
        ({"max_batch_size": 64}, "cannot set max_batch_size"),
        ({"dynamic_batching": {"preferred_batch_size": [16]}}, "prefers batches of 16"),
        ({"dynamic_batching": {"priority_levels": 3}}, "3 priority levels and the default level 0"),
        ({"dynamic_batching": {"priority_queue_policy": {"4": {}}}}, "a queue policy for priority 4"),
    ],
)
def test_what_triton_would_refuse_is_refused_before_the_run(own: Any, says: str) -> None:
    with pytest.raises(InputError) as caught:
        check_own(own, 8)
    assert says in str(caught.value).replace("\n", " ").replace("  why: ", ": ") or says in (
        f"{caught.value.what}: {caught.value.why}"
    )


def test_a_server_that_forms_no_batches_has_no_batcher() -> None:
    with pytest.raises(InputError, match="forms no batches"):
        check_own({"dynamic_batching": {}}, 0)
