"""The preset that the package itself exports; the others are files in `configs/`."""

from jax_huginn.config.schema import Config, ModelConfig, MoEConfig, RecurrenceConfig


def MoEHuginnConfig700M() -> Config:  # noqa: N802  (a public name, see README)
    """0.71 B parameters: width 2048, 16 heads of 128, 2/4/2 blocks, 8 routed and 1 shared expert of 2816."""
    return Config(
        model=ModelConfig(width=2048, heads=16, kv_heads=16, mlp_width=5632, remat="dots", unroll=True),
        moe=MoEConfig(experts=8, active=2, width=2816),
        recurrence=RecurrenceConfig(mean=32, backprop_depth=8),
    )
