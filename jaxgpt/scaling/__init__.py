"""Scaling laws: sweeps over sizes and budgets, fits with errors, predictions before the run.

from jaxgpt import scaling

law = scaling.fit(scaling.read_runs("sweep"), bootstrap=200)
law.predict(1e9, 20e9), law.optimum(1e20)
"""

from jaxgpt.scaling.figures import plot_law
from jaxgpt.scaling.laws import (
    PUBLISHED,
    IsoFlopFit,
    KaplanLaw,
    Law,
    PowerLaw,
    Run,
    fit,
    fit_isoflop,
    fit_power_law,
    leave_out,
    predict_loss,
)
from jaxgpt.scaling.study import Plan, run_study
from jaxgpt.scaling.sweep import Size, make_config, read_runs, run_sweep, tune

__all__ = [
    "PUBLISHED",
    "IsoFlopFit",
    "KaplanLaw",
    "Law",
    "Plan",
    "PowerLaw",
    "Run",
    "Size",
    "fit",
    "fit_isoflop",
    "fit_power_law",
    "leave_out",
    "make_config",
    "plot_law",
    "predict_loss",
    "read_runs",
    "run_study",
    "run_sweep",
    "tune",
]
