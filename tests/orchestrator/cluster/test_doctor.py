"""What the probes of a cluster say, as lines that pass or name the remedy."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from contract.answers import Check
from contract.attempt import ClockReport, GpuReport, LinkReport, NodeReport
from orchestrator.cluster.doctor_checks import Examination, checks_of
from orchestrator.cluster.nodes import Machine
from workers.probe import look_at_gpu, partners

MACHINES = (Machine("a" * 8, "10.0.0.1", True), Machine("b" * 8, "10.0.0.2", False))


H100 = GpuReport(
    name="NVIDIA H100 (compute capability 9.0)",
    precisions=["fp32", "TF32", "bf16", "fp16"],
    kernels="triton 3.6.0",
)
T4 = GpuReport(
    name="Tesla T4 (compute capability 7.5)",
    precisions=["fp32", "fp16"],
    kernels="triton 3.6.0",
)
NO_COMPILER = H100.model_copy(
    update={"kernels": "torch", "complaints": ["no Triton kernel for suppression on this GPU"]}
)


def report(index: int, **fields: Any) -> NodeReport:
    plain: dict[str, Any] = {
        "host": f"h{index}",
        "now": 0.0,
        "versions": {"python": "3.11", "ray": "2.60.0", "torch": "2.15.0", "numpy": "2.0"},
        "sources": "5" * 64,
        "gpu_driver": "NVIDIA 550.1, 8 devices",
        "gpu": H100,
        "disk_free_gib": 100.0,
        "shm_free_gib": 8.0,
        "mlflow_error": "",
        "clock": ClockReport(offset_s=0.01, uncertainty_s=0.001) if index else None,
        "links": [
            LinkReport(peer=1 - index, address="10.0.0.1", interface="eth0", mib_per_s=900.0)
        ],
    }
    return NodeReport(index=index, **(plain | fields))


def lines(*reports: NodeReport, **fields: Any) -> dict[str, Check]:
    plain: dict[str, Any] = {
        "machines": MACHINES,
        "reports": {machine.id: report for machine, report in zip(MACHINES, reports, strict=False)},
        "failures": {},
        "ray_version": "2.60.0",
        "tracking_uri": "http://mlflow:5000",
        "tracking_error": "",
        "storage": "s3://studies",
        "storage_error": "",
        "service_lag_s": 0.0,
    }
    return {check.name: check for check in checks_of(Examination(**(plain | fields)))}


def test_a_sound_cluster_passes_every_line() -> None:
    checks = lines(report(0), report(1))
    assert [name for name, check in checks.items() if not check.ok] == []
    assert checks["all-reduce"].found == "1 pairs over eth0, 900 to 900 MiB/s (gloo, 4 MiB)"
    assert checks["nodes"].found == "2 nodes: h0/aaaaaa, h1/bbbbbb"
    assert len(checks) == 14


@pytest.mark.parametrize(
    ("name", "fields", "words"),
    [
        (
            "ray",
            {"versions": {"python": "3.11", "ray": "2.50.0", "torch": "2.15.0", "numpy": "2.0"}},
            "2.50.0 on h1/bbb",
        ),
        (
            "versions",
            {"versions": {"python": "3.11", "ray": "2.60.0", "torch": "2.11.0", "numpy": "2.0"}},
            "torch: 2.15",
        ),
        ("drivers", {"gpu_driver": "NVIDIA 535.0, 8 devices"}, "NVIDIA 535.0 on h1"),
        ("drivers", {"gpu_driver": "nvidia-smi fails"}, "h1/bbbbbb: nvidia-smi fails"),
        ("precision", {"gpu": T4}, "no bf16 on h1/bbbbbb: Tesla T4"),
        (
            "precision",
            {"gpu": GpuReport(error="torch 2.15.0+cpu finds no GPU, it is a build without CUDA")},
            "h1/bbbbbb: torch 2.15.0+cpu finds no GPU",
        ),
        ("kernels", {"gpu": NO_COMPILER}, "h1/bbbbbb: no Triton kernel for suppression"),
        ("code", {"sources": "6" * 64}, "666666666666 on h1"),
        (
            "meeting",
            {"meeting_error": "connection refused", "clock": None, "links": []},
            "connection refused",
        ),
        (
            "all-reduce",
            {"links": [LinkReport(peer=0, error="timed out")]},
            "h1/bbbbbb with h0/aaaaaa: timed out",
        ),
        (
            "storage",
            {"storage_error": "the file of node 0 is not here"},
            "h1/bbbbbb: the file of node 0",
        ),
        ("clocks", {"clock": ClockReport(offset_s=-9.0, uncertainty_s=0.1)}, "-9.0 s"),
        ("disk", {"disk_free_gib": 1.0}, "h1/bbbbbb: 1.0 GiB free"),
        ("memory", {"shm_free_gib": 0.06}, "0.06 GiB free"),
        ("mlflow", {"mlflow_error": "refused"}, "h1/bbbbbb: refused"),
    ],
)
def test_each_fault_fails_its_line_alone_and_says_the_remedy(
    name: str, fields: dict[str, Any], words: str
) -> None:
    checks = lines(report(0), report(1, **fields))
    assert [check.name for check in checks.values() if not check.ok] == [name]
    assert words in checks[name].found
    assert checks[name].remedy


def test_a_login_of_the_service_that_is_refused_fails_the_line_of_mlflow() -> None:
    uri = "http://ann:secret@mlflow:5000"
    refused = lines(report(0), report(1), tracking_uri=uri, tracking_error="status 401")["mlflow"]
    assert (refused.ok, refused.found) == (False, "the service: status 401")
    good = lines(report(0), report(1), tracking_uri=uri)["mlflow"]
    assert good.found == "http://mlflow:5000 answers every node"


def test_the_doctor_says_which_precision_is_real_and_which_kernels_compute() -> None:
    checks = lines(report(0), report(1))
    assert checks["precision"].found == f"{H100.name}: fp32, TF32, bf16, fp16"
    assert checks["kernels"].found == "triton 3.6.0"
    old = lines(report(0, gpu=T4), report(1, gpu=T4))["precision"]
    assert old.ok, "all nodes refuse bf16 alike"
    assert "bf16 would be emulated and is refused, choose fp16 or fp32" in old.found
    # a node without GPUs beside one with some has no say
    assert lines(report(0), report(1, gpu=None, gpu_driver=""))["precision"].ok


def test_a_cluster_without_gpus_or_of_an_older_version_has_no_line_on_them() -> None:
    older = [
        NodeReport.model_validate(
            {name: value for name, value in report(i).model_dump().items() if name != "gpu"}
        )
        for i in range(2)
    ]
    assert {"precision", "kernels"}.isdisjoint(lines(*older))


def test_a_torch_that_reaches_no_gpu_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = look_at_gpu()
    assert found.error.startswith(f"torch {torch.__version__} finds no GPU")
    assert (found.precisions, found.kernels, found.complaints) == ([], "", [])


def test_a_node_that_says_nothing_is_named() -> None:
    checks = lines(
        report(0), failures={MACHINES[1].id: "its probe is FAILED: no module named workers"}
    )
    assert not checks["nodes"].ok
    assert "10.0.0.2/bbbbbb: its probe is FAILED: no module" in checks["nodes"].found
    assert list(lines(failures={machine.id: "gone" for machine in MACHINES})) == ["nodes"]
    assert not lines(machines=())["nodes"].ok


def test_the_service_s_own_view_counts() -> None:
    checks = lines(report(0), report(1), storage_error="no such bucket", service_lag_s=60.0)
    assert [check.name for check in checks.values() if not check.ok] == ["storage", "clocks"]
    assert "the service: +60.0 s ahead" in checks["clocks"].found


def test_a_clock_is_wrong_only_beyond_what_the_journey_explains() -> None:
    slow = ClockReport(offset_s=2.5, uncertainty_s=1.0)
    assert lines(report(0), report(1, clock=slow))["clocks"].ok


@pytest.mark.parametrize("nodes", range(1, 10))
def test_every_pair_of_probes_meets_once_and_nobody_waits_for_a_ring(nodes: int) -> None:
    order = [list(partners(index, nodes)) for index in range(nodes)]
    assert all(
        sorted(met) == [other for other in range(nodes) if other != index]
        for index, met in enumerate(order)
    )
    met = [0] * nodes
    progress = True
    while progress:
        progress = False
        for one in range(nodes):
            other = order[one][met[one]] if met[one] < nodes - 1 else one
            if other != one and order[other][met[other] :][:1] == [one]:
                met[one], met[other], progress = met[one] + 1, met[other] + 1, True
    assert met == [nodes - 1] * nodes
