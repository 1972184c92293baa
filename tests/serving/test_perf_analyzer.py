"""perf_analyzer's command line, input and CSV, and how results of clients get into a report and stay there."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import numpy as np
import pytest

from optin_export import cli
from optin_export.report import Report, still_deployed
from optin_export.serving.client import Model, Url
from optin_export.serving.deployed import Reference
from optin_export.serving.perf_analyzer import command_line, write_input_data

#: As perf_analyzer 2.46 writes it with --verbose-csv and --percentile=99, some columns left out.
CSV = """Concurrency,Inferences/Second,Client Send,Network+Server Send/Recv,Server Queue,Server Compute Input,Server Compute Infer,Server Compute Output,Client Recv,p50 latency,p90 latency,p95 latency,p99 latency,Avg latency,request/response,response wait
1,{rate},21,700,30,12,{compute},6,2,{p50},1900,2000,2100,1700,40,1600
4,{rate},21,700,90,12,{compute},6,2,{p50},2900,3000,3100,2700,40,1600
"""  # noqa: E501


@pytest.fixture
def tables(tmp_path: Path) -> tuple[str, str]:
    (tmp_path / "base.csv").write_text(CSV.format(rate=500.5, compute=1000, p50=1800))
    (tmp_path / "pruned.csv").write_text(CSV.format(rate=900, compute=500, p50=1000))
    return str(tmp_path / "base.csv"), str(tmp_path / "pruned.csv")


def test_the_command_line_names_everything() -> None:
    url, model = Url.parse("grpcs://host:8001"), Model.parse("m:2")
    words = shlex.split(command_line(url, model, 8, [4, 1], Path("a b.json"), Path("out.csv")))
    assert words[:3] == ["perf_analyzer", "-m", "m"]
    for pair in (
        ("-x", "2"),
        ("-u", "host:8001"),
        ("-i", "grpc"),
        ("-b", "8"),
        ("--input-data", "a b.json"),
        ("-f", "out.csv"),
    ):
        assert words[words.index(pair[0]) + 1] == pair[1]
    assert "--concurrency-range" in words and "1:4" in words and "--ssl-grpc-use-ssl" in words


def test_input_data_holds_the_rows(tmp_path: Path) -> None:
    ids = np.arange(6).reshape(2, 3)
    write_input_data(tmp_path / "x.json", Reference({"ids": ids}, {"base": np.zeros((2, 1))}, "y", 1.0))
    stored = json.loads((tmp_path / "x.json").read_text())
    assert stored == {"data": [{"ids": {"content": row.tolist(), "shape": [3]}} for row in ids]}


def test_a_csv_goes_into_the_report_and_stays_with_its_graphs(run: Path, tables: tuple[str, str]) -> None:
    names = ["--model", "tiny-base", "--model", "tiny", "--run", str(run)]
    assert cli.main(["client", "127.0.0.1:1", *names, "--import-perf-analyzer", *tables]) == 0
    report = Report.model_validate_json((run / "report.json").read_text())
    assert [(one.source, one.concurrency, one.base.p50) for one in report.deployed] == [
        ("perf_analyzer", 1, 1.8),
        ("perf_analyzer", 4, 1.8),
    ]
    one = report.deployed[0]
    assert (one.pruned.compute, one.base.throughput, one.speedup) == (0.5, 500.5, None)
    page = (run / "report.html").read_text()
    assert "by perf_analyzer" in page and "Deployed latency" in page
    assert still_deployed(run) == report.deployed
    assert cli.main(["verify", str(run)]) == 0
    (run / "onnx" / "pruned.onnx").write_bytes(b"another")
    assert still_deployed(run) == ()


@pytest.mark.parametrize("content", ["", "a,b\n1,2\n", "Concurrency,Inferences/Second\n1,x\n", "\x00", CSV[:200]])
def test_what_is_no_csv_of_perf_analyzer(
    run: Path, tables: tuple[str, str], content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path(tables[1]).write_text(content)
    names = ["--model", "tiny-base", "--model", "tiny", "--run", str(run)]
    before = (run / "report.json").read_bytes()
    assert cli.main(["client", "127.0.0.1:1", *names, "--import-perf-analyzer", *tables]) == 2
    err = capsys.readouterr().err
    assert "perf_analyzer" in err or "no setting in common" in err
    assert (run / "report.json").read_bytes() == before
