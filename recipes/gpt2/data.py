"""Paragraphs of WikiText-2 (Merity et al., 2017) from the hub: its empty lines and headings are left out."""

from __future__ import annotations

SHORTEST = 200


def _paragraphs(split: str) -> dict[str, list[str]]:
    import datasets

    table = datasets.load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split=split)
    return {"text": [text for text in table["text"] if len(text) >= SHORTEST]}


def calibration() -> dict[str, list[str]]:
    return _paragraphs("train")


def held_out() -> dict[str, list[str]]:
    return _paragraphs("test")
