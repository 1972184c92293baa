"""The stages of a run. `pipeline` is the only place that knows their order.

Each stage is a function of the run context and of the facts of earlier stages. It writes its result into the run
directory and returns facts about it as JSON. Files, in order: `checks` and `preflight` (before anything is loaded),
`scoring` (load, score, loss curves), `search` (with `latency_trials` and `accuracy_search`), `prune_and_repair`,
`export_and_measure` (ONNX, engines, measurements; `other_machines` continues a finished run elsewhere),
`ship_and_report`.
"""
