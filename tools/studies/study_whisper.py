#!/usr/bin/env python3
"""Whisper tiny.en with a smaller encoder and its whole decoder: transcripts, encoder states and speedup by budget.

    python tools/studies/study_whisper.py --budgets 0.8 0.7 0.6

Runs the command on recipes/whisper_tiny_en.yaml with a folder and recordings that it writes to runs/whisper, and
writes docs/measurements/studies/whisper.json. Calibration rows are joined from the eight sentences of ASR_train.json;
judged are the other five recordings: two sentences of ASR_dev.json, two without a text, and jfk.flac.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import whisper_model
from study_files import machine, save, saved_rows
from torch.nn import functional as F

import optin_export
from optin_export.data.recordings import samples_of
from optin_export.measure.transcripts import edits
from optin_export.report.schema import read_report

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "recipes" / "whisper_tiny_en.yaml"
NAME, RATE, LONGEST = "whisper", 16_000, 100
#: <|startoftranscript|><|notimestamps|>, and <|endoftext|>, of the English-only models.
START, END = (50257, 50362), 50256
#: Encoder positions per second of sound.
POSITIONS = 50
#: Exit codes of a run that ended with a report.
REPORTED = (0, 4)


def write_calibration(speech: Path, place: Path, rows: int, seed: int = 0) -> list[str]:
    """Write `rows` recordings of up to 28 s, each of training sentences in a random order, at random speeds and levels,
    with pauses between them; returns the names of the sentences."""
    import soundfile
    from scipy.signal import resample

    names = sorted(json.loads((speech / "ASR_train.json").read_text(encoding="utf-8")))
    sentences = [samples_of(speech / f"{name}.wav", RATE) for name in names]
    generator = np.random.default_rng(seed)
    place.mkdir(parents=True, exist_ok=True)
    for row in range(rows):
        parts, longest = [], generator.uniform(2.0, 28.0) * RATE
        while sum(map(len, parts)) < longest:
            one = sentences[generator.integers(len(sentences))]
            spoken = resample(one, round(len(one) / generator.uniform(0.85, 1.15))) * generator.uniform(0.3, 1.2)
            parts += [np.zeros(round(generator.uniform(0.0, 0.8) * RATE)), spoken]
        joined = np.clip(np.concatenate(parts)[: 28 * RATE], -1.0, 1.0)
        soundfile.write(place / f"{row:03}.wav", joined, RATE, subtype="PCM_16")
    return names


def judged(speech: Path) -> dict[str, str | None]:
    """{file: its text, if it has one} of the recordings that no calibration row is made of."""
    texts = json.loads((speech / "ASR_dev.json").read_text(encoding="utf-8"))
    known = {f"{name}.wav": row["words"] for name, row in texts.items()}
    return {**known, "spk1_snt6.wav": None, "spk2_snt6.wav": None, "jfk.flac": None}


Encoder = Callable[[torch.Tensor], torch.Tensor]


class Judge:
    """The whole model, and what it hears in the judged recordings. encode: mel features -> encoder states."""

    def __init__(self, folder: Path, speech: Path) -> None:
        from tokenizers import Tokenizer
        from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration

        self.model = WhisperForConditionalGeneration.from_pretrained(folder).eval()
        self.words = Tokenizer.from_file(str(folder / "tokenizer.json"))
        prepare = WhisperFeatureExtractor.from_pretrained(folder)
        self.texts, self.seconds, self.inputs = judged(speech), {}, {}
        for file in self.texts:
            samples = samples_of(speech / file, RATE)
            self.seconds[file] = len(samples) / RATE
            self.inputs[file] = prepare(samples, sampling_rate=RATE, return_tensors="pt").input_features
        with torch.no_grad():
            self.states = {file: self.whole(one) for file, one in self.inputs.items()}
            self.heard = {file: self.transcript(one) for file, one in self.states.items()}

    def whole(self, features: torch.Tensor) -> torch.Tensor:
        states: torch.Tensor = self.model.model.encoder(features).last_hidden_state
        return states

    def transcript(self, states: torch.Tensor) -> str:
        """The decoder's most likely next token, again and again, without timestamps."""
        from transformers.modeling_outputs import BaseModelOutput

        encoded, found, past, new = BaseModelOutput(last_hidden_state=states), list(START), None, list(START)
        for _ in range(LONGEST):
            step = self.model(
                encoder_outputs=encoded, decoder_input_ids=torch.tensor([new]), past_key_values=past, use_cache=True
            )
            past, new = step.past_key_values, [int(step.logits[0, -1].argmax())]
            if new[0] == END:
                break
            found += new
        return str(self.words.decode(found[len(START) :])).strip()

    @torch.no_grad()
    def judge(self, encode: Encoder) -> dict[str, Any]:
        """Transcripts of another encoder with the same decoder, and how near its states are to the whole one's."""
        states = {file: encode(one) for file, one in self.inputs.items()}
        heard = {file: self.transcript(one) for file, one in states.items()}
        near = {file: F.cosine_similarity(one, self.states[file], dim=-1)[0] for file, one in states.items()}
        spoken = [near[file][: round(self.seconds[file] * POSITIONS)] for file in near]
        labelled = [file for file, text in self.texts.items() if text is not None]
        return {
            "transcripts": heard,
            "wer_dense": word_errors([self.heard[file] for file in heard], list(heard.values())),
            "wer_text": word_errors([str(self.texts[file]) for file in labelled], [heard[one] for one in labelled]),
            "cosine_spoken": round(float(torch.cat(spoken).mean()), 4),
            "cosine_all": round(float(torch.stack(list(near.values())).mean()), 4),
        }


def word_errors(texts: Sequence[str], heard: Sequence[str]) -> list[int]:
    """Word edits, and words of the texts."""
    return [sum(column) for column in zip(*map(edits, texts, heard), strict=True)]


def run(folder: Path, budget: float, settings: Sequence[str]) -> dict[str, Any]:
    """The command at one budget; what its report says."""
    own = [f"model.source={folder / 'model'}", f"data.calibration.source=wav:{folder / 'calibration'}"]
    words = [word for one in (*own, *settings, f"prune.budget.macs={budget}") for word in ("--set", one)]
    code = subprocess.run([sys.executable, "-m", "optin_export", str(RECIPE), "--out", str(folder / "run"), *words])
    if code.returncode not in REPORTED:
        sys.exit(code.returncode)
    report = read_report(folder / "run").model_dump(mode="json")
    timed = report["latency"][0]
    return {
        "exit": code.returncode,
        "verdict": report["verdict"]["summary"],
        "macs": round(report["macs"]["ratio"], 4),
        "params": round(report["params"]["ratio"], 4),
        "base_ms": timed["base_ms"]["p50"],
        "pruned_ms": timed["pruned_ms"]["p50"],
        "other_work": None if timed["neighbours"] is None else round(sum(timed["neighbours"].values()), 3),
        "clock": timed["clock"],
        "speedup": interval(timed["speedup"]),
        "speedup_cpu": interval(timed["by"]["cpu"]) if "cpu" in timed["by"] else None,
    }


def interval(speedup: dict[str, float]) -> list[float]:
    return [round(speedup[name], 3) for name in ("median", "ci_low", "ci_high")]


def called(encoder: Any, features: torch.Tensor) -> torch.Tensor:
    states: torch.Tensor = encoder(input_features=features)
    return states


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--budgets", nargs="+", type=float, default=(0.8, 0.7, 0.6))
    parser.add_argument("--speech", type=Path, default=ROOT.parent / "shared" / "data" / "speech")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / NAME)
    parser.add_argument("--rows", type=int, default=16, help="calibration rows")
    parser.add_argument("--set", nargs="*", default=[], help="overrides of the recipe, as on the command line")
    options = parser.parse_args()
    torch.set_num_threads(1)
    folder = options.out.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "model" / "config.json").is_file():
        whisper_model.save_folder(whisper_model.fetch(folder), folder / "model")
    sentences = write_calibration(options.speech, folder / "calibration", options.rows)
    judge, rows = Judge(folder / "model", options.speech), {row["budget"]: row for row in saved_rows(NAME)}
    for budget in options.budgets:
        measured = run(folder, budget, options.set)
        pruned: Any = optin_export.load_model(folder / "run" / "model")
        rows[budget] = {"budget": budget, **measured, **judge.judge(partial(called, pruned))}
        facts = {
            "machine": machine("torch", "transformers", "onnxruntime"),
            "calibration": {"rows": options.rows, "sentences": sentences},
            "judged": {file: {"text": text, "dense": judge.heard[file]} for file, text in judge.texts.items()},
            "dense": judge.judge(judge.whole),
        }
        save(NAME, {**facts, "rows": [rows[one] for one in sorted(rows, reverse=True)]})


if __name__ == "__main__":
    main()
