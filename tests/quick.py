"""How tests compile: they do so much and compute little."""

XLA_FLAGS = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    " --xla_cpu_use_fusion_emitters=false --xla_cpu_prefer_vector_width=128"
    " --xla_cpu_parallel_codegen_split_count=1"
)
"""LLVM's passes are left out, and XLA's older emitters of fused loops taken: each halves the
compilation. Narrow vectors and one thread a program save a tenth more. XLA's own passes are as
ever; a user's emitters make the run that goes on with an old one, and the plans."""
