"""Predicted beside measured, from the figures of a run."""

from __future__ import annotations

from luban.report.predicted_vs_measured import predicted_vs_measured


def test_a_gpu_run_says_memory_time_utilisation_and_energy():
    figures = {
        "device": "cuda",
        "predicted_memory_bytes": 50e9,
        "peak_cuda_bytes": 52e9,
        "peak_rss_bytes": 3e9,
        "predicted_process_bytes": 1e9,
        "predicted_step_seconds": 0.4,
        "step_seconds": 0.5,
        "model_flops_per_step": 200e12,
        "peak_flops": 1000e12,
        "accelerator_watts": 720,
        "data_wait": 0.004,
        "seconds": 1000.0,
        "energy_joules": 360_000.0,
        "energy_share": 0.5,
        "schedules": [
            {
                "remat": "rotor",
                "budget": "50%",
                "peak_bytes": 4e9,
                "everything_bytes": 8e9,
                "layers": 24,
                "repeated": 20,
                "transfers": 0,
            }
        ],
        "kernels": ["attention: cuDNN (causal, bf16, heads of 64)", "feed-forward: SwiGLU inside its matmuls"],
    }
    rows = [{"step": s, "heldout_loss": loss, "seconds": 100.0 * s} for s, loss in ((1, 4.0), (2, 3.02), (3, 3.0))]
    found = {what: (predicted, measured) for what, predicted, measured in predicted_vs_measured(figures, rows)}
    assert found["peak memory of the accelerator"] == ("50 GB", "52 GB (+4%)")
    assert found["median step time"] == ("400 ms", "500 ms (+25%)")
    assert found["model FLOP/s, MFU"] == ("500 TFLOP/s, 50.0% of 1,000", "400 TFLOP/s, 40.0% of 1,000")
    assert found["waiting for data"] == ("", "0.40% of the time")
    assert found["within 1% of the best held-out loss, 3.000"] == ("", "after 3m20s, up to 0.04 kWh")
    assert found["the whole run"] == ("", "16m40s, up to 0.2 kWh")
    assert found["energy, read off 50% of the GPUs"] == ("up to 0.1 kWh", "0.1 kWh, 100% of that")
    said = "4 GB of the 8 GB that saving everything takes, 20 forward passes of 24 layers repeated"
    assert found["activations of 24 layers by rotor, budget 50%"] == ("", said)
    assert found["attention"] == ("", "cuDNN (causal, bf16, heads of 64)")
    assert found["feed-forward"] == ("", "SwiGLU inside its matmuls")


def test_a_cpu_run_says_what_its_process_held_and_no_share_of_an_unknown_peak():
    figures = {
        "device": "cpu",
        "predicted_memory_bytes": 4e8,
        "predicted_process_bytes": 9e8,
        "peak_rss_bytes": 9.9e8,
        "predicted_step_seconds": 0.5,
        "step_seconds": 0.5,
        "model_flops_per_step": 1e11,
        "seconds": 10.0,
    }
    found = {what: (predicted, measured) for what, predicted, measured in predicted_vs_measured(figures, [])}
    assert found["peak memory of the process"] == ("900 MB", "990 MB (+10%)")
    assert found["model FLOP/s, MFU"] == ("0.2 TFLOP/s", "0.2 TFLOP/s")
    assert found["the whole run"] == ("", "10.0s")
    with_caveats = predicted_vs_measured(
        figures | {"prediction_caveats": ["rates were measured on a busy machine"]}, []
    )
    assert with_caveats == predicted_vs_measured(figures, [])  # it stands below the table
    rows = [{"step": 1, "heldout_loss": None, "seconds": 1.0}, {"step": 2, "heldout_loss": 3.0, "seconds": 2.0}]
    assert ("within 1% of the best held-out loss, 3.000", "", "after 2.0s") in predicted_vs_measured(
        figures, rows
    )  # null: NaN


def test_a_run_from_before_predictions_has_no_table():
    assert predicted_vs_measured({"tokens": 3}, []) == []
