"""Name the packages; pyproject.toml has all else. In a wheel, configs/ is jaxgpt.configs."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["jaxgpt*"]), "jaxgpt.configs"],
    package_dir={"jaxgpt.configs": "configs"},
)
