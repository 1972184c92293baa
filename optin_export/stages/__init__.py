"""The stages of a run. `pipeline` is the only place that knows their order; `sweep` runs one recipe several times.

One file per stage: `load`, `score`, `curves`, `search` (with `latency_trials` and `accuracy_search`),
`prune_and_repair`, `export`, `build`, `measure`, `ship`, `report`. Each takes the run context (`context`) and what
earlier stages returned (`results`), and writes files into the run directory. `load` goes through `checks` before
anything is written; `preflight` goes through the same checks without weights. `other_machines` continues a finished
run elsewhere.
"""
