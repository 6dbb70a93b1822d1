"""Golden texts of plans: the built-in decoder on a mixed fleet of the shipped catalog."""

from hybrid.config import FleetConfig, ModelConfig
from hybrid.hardware.fleet import build_fleet
from hybrid.models.profile import build_profile
from hybrid.scheduler.planner import plan

MIXED = FleetConfig.model_validate(
    {
        "islands": [
            {"name": "trainium", "device": "trn2", "count": 2},
            {"name": "gpus", "device": "h100", "count": 2},
        ],
        "links": [{"between": ["trainium", "gpus"], "bandwidth_bytes_per_s": 12.5e9, "latency_s": 5e-5}],
    }
)


def texts() -> dict[str, str]:
    model = ModelConfig(
        num_blocks=22,
        hidden_size=2048,
        num_heads=32,
        num_kv_heads=4,
        intermediate_size=5632,
        vocab_size=32000,
        sequence_length=2048,
    )
    profile = build_profile(model, microbatch=2, precision="bf16")
    found = {}
    for name, schedule, num_stages in (("mixed_1f1b", "1f1b", None), ("mixed_gpipe_3", "gpipe", 3)):
        one = plan(
            profile,
            build_fleet(MIXED),
            job=name,
            schedule=schedule,
            num_microbatches=16,
            precision="bf16",
            num_stages=num_stages,
        )
        found[f"plans/{name}.yaml"] = one.to_yaml()
        found[f"plans/{name}.txt"] = f"{one}\n\n{one.replica.simulate().gantt(110)}"
    return found
