"""List the packages: in a wheel, configs/ is jaxgpt.configs. All else is in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["jaxgpt*"]), "jaxgpt.configs"],
    package_dir={"jaxgpt.configs": "configs"},
)
