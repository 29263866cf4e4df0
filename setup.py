"""Packaging. `kernels/` is installed as minitrl.kernels: a top-level package of that name would shadow Hugging Face's
`kernels` and break transformers. minitrl/kernels.py is the door that finds it, installed or in a checkout."""

from setuptools import setup

setup(
    name="minitrl",
    version="0.1.0",
    description="Reinforcement-learning post-training of language models in plain PyTorch: GRPO and friends",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=["minitrl", "minitrl.kernels"],
    package_dir={"minitrl.kernels": "kernels"},
    install_requires=[
        "torch>=2.10",
        'triton; platform_system=="Linux"',  # unbounded: torch pins the one that it was built with
        "safetensors>=0.5",
        "tokenizers>=0.20",
        "numpy>=1.26",
        "jinja2>=3.1.6",  # older sandboxes could be escaped from
        "tqdm>=4.60",
        "PyYAML>=6.0",
        "huggingface_hub>=0.26",
    ],
    extras_require={
        "test": ["pytest>=8"],
        "parity": ["transformers>=5", "trl==1.16.0", "peft>=0.17"],
        "peers": ["liger-kernel==0.8.5", "cut-cross-entropy==25.1.1"],  # kernels that benchmarks compare ours with
        "plot": ["matplotlib>=3.8"],
        "tensorboard": ["tensorboard>=2.15"],
    },
)
