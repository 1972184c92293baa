"""The section of docs/results.md about Whisper with a smaller encoder, from docs/measurements/studies/whisper.json."""

from __future__ import annotations

from typing import Any

from plots import markdown_table, section


def _rate(errors: list[int]) -> str:
    return f"{errors[0]} of {errors[1]} ({100 * errors[0] / errors[1]:.0f} %)"


def _faster(speedup: list[float] | None) -> str:
    return "-" if speedup is None else f"{speedup[0]:.2f}x ({speedup[1]:.2f} to {speedup[2]:.2f})"


def whisper(content: dict[str, Any]) -> list[str]:
    """Lines of the section."""
    machine, dense, judged = content["machine"], content["dense"], content["judged"]
    calibration = content["calibration"]
    rows = [
        [
            f"{row['budget']:g}",
            f"{100 * row['macs']:.1f} %",
            _rate(row["wer_dense"]),
            _rate(row["wer_text"]),
            f"{row['cosine_spoken']:.3f}",
            f"{row['cosine_all']:.3f}",
            _faster(row["speedup"]),
            _faster(row["speedup_cpu"]),
        ]
        for row in content["rows"]
    ]
    busy = [row["other_work"] for row in content["rows"] if row["other_work"] is not None]
    texts = sum(one["text"] is not None for one in judged.values())
    heard = [
        [file, one["dense"], *(row["transcripts"][file] for row in content["rows"])] for file, one in judged.items()
    ]
    prose = [
        "The encoder of Whisper tiny.en (8.2 M of 37.8 M parameters) made smaller by the command on",
        "`recipes/whisper_tiny_en.yaml`; the decoder is whole (`tools/studies/study_whisper.py`). Word errors of the",
        "transcripts (the decoder's likeliest token, again and again) against those of the unpruned model, and against",
        f"the texts of {texts} recordings, where the unpruned model has {_rate(dense['wer_text'])}: the text of",
        "spk2_snt5 is that of another recording in the data. Cosine of encoder",
        "states with those of the unpruned encoder, mean over positions with sound and over all 1,500. Calibrated on",
        f"{calibration['rows']} recordings joined from {len(calibration['sentences'])} sentences of two speakers at",
        f"random speeds; judged on {len(judged)} recordings that are not among them, two of each speaker and one",
        "speech. So few words say which budgets fail, not how large a small loss is.",
        *_timed(busy),
        f"{machine['cpu']}, one thread; torch {machine['torch']}, transformers {machine['transformers']}, onnxruntime",
        f"{machine['onnxruntime']}.",
    ]
    columns = ["MACs asked", "MACs left", "word errors against unpruned", "against the texts", "cosine, sound"]
    columns += ["cosine, all", "encoder faster, clock", "by CPU time"]
    budgets = [f"at {row['budget']:g}" for row in content["rows"]]
    return [
        *section("Whisper with a smaller encoder", prose, columns, rows),
        "",
        "What is heard:",
        "",
        *markdown_table(["recording", "unpruned", *budgets], heard),
    ]


def _timed(busy: list[float]) -> list[str]:
    if not busy:
        return []
    share = f"{100 * max(busy):.0f} %"
    return [f"Other work took up to {share} of the machine's CPU time while the encoders were timed in turn."]
