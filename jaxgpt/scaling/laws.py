"""Scaling laws: the loss as a function of parameters N and training tokens D.

    law = fit(runs)                         E + A / N^alpha + B / D^beta, with standard errors
    law.predict(1e9, 20e9)                  a loss in nats per token
    law.optimum(6e20)                       the N and D that a budget of FLOPs is best spent on

Source: Hoffmann et al. 2022 (Chinchilla), arXiv:2203.15556, approach 3; Besiroglu et al. 2024,
arXiv:2404.10102, who found its published fit to be wrong; Kaplan et al. 2020, arXiv:2001.08361.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize, nnls

from jaxgpt.settings import ConfigError

DELTA = 1e-3  # of the Huber loss on log losses, as in the paper
FLOPS_PER_PARAMETER = 6  # of a token, forward and backward: C = 6 N D
MIN_RUNS = 6  # there are five constants
EXPONENTS = np.linspace(0.05, 1.25, 25)  # where a fit begins, for alpha and beta
BEST_STARTS = 12  # of these, that are followed to the end


@dataclass(frozen=True)
class Run:
    """The outcome of a training run.

    Attributes:
        parameters: N.
        tokens: D.
        loss: nats per token.
        flops: C; None is 6 N D.
        name: of the run, for tables.
    """

    parameters: float
    tokens: float
    loss: float
    flops: float | None = None
    name: str = ""

    @property
    def compute(self) -> float:
        """The FLOPs of the run."""
        return FLOPS_PER_PARAMETER * self.parameters * self.tokens if self.flops is None else (
            self.flops)  # fmt: skip


@dataclass(frozen=True)
class Law:
    """L(N, D) = E + A / N^alpha + B / D^beta.

    Attributes:
        samples: float64 [S 5], the constants E, A, B, alpha, beta of fits to resampled runs.
        count: of the runs that it was fitted to; 0 for published constants.
    """

    E: float
    A: float
    B: float
    alpha: float
    beta: float
    samples: np.ndarray | None = None
    count: int = 0

    @property
    def constants(self) -> np.ndarray:
        """E, A, B, alpha, beta: float64 [5]."""
        return np.array([self.E, self.A, self.B, self.alpha, self.beta])

    @property
    def errors(self) -> np.ndarray:
        """The standard errors of the constants by the bootstrap, float64 [5]; NaN without one."""
        return np.full(5, np.nan) if self.samples is None else self.samples.std(0, ddof=1)

    def predict(self, parameters, tokens):
        """Return the loss of N parameters trained on D tokens, nats per token."""
        return _predict(self.constants, np.asarray(parameters, float), np.asarray(tokens, float))

    def predict_interval(self, parameters: float, tokens: float, level: float = 0.95):
        """Return the (low, high) between which the loss lies at this level, by the bootstrap.

        It is the uncertainty of the constants alone: that of a run comes on top.
        """
        if self.samples is None:
            raise ConfigError("this law has no bootstrap samples: fit it with bootstrap=200.")
        losses = [_predict(row, parameters, tokens) for row in self.samples]
        tail = 50 * (1 - level)
        return tuple(float(x) for x in np.percentile(losses, [tail, 100 - tail]))

    def optimum(self, flops: float) -> tuple[float, float]:
        """Return the N and D with the lowest loss for C = 6 N D FLOPs.

        Source: Hoffmann et al. 2022, equation 4.
        """
        a, b = self.alpha, self.beta
        ratio = (a * self.A / (b * self.B)) ** (1 / (a + b))
        work = flops / FLOPS_PER_PARAMETER
        return ratio * work ** (b / (a + b)), work ** (a / (a + b)) / ratio

    def cost_of_overtraining(self, parameters: float, tokens: float) -> float:
        """Return the FLOPs of a run over those of the best run with the same loss, 1 or more."""
        goal = float(self.predict(parameters, tokens))
        low, high = np.log(1.0), np.log(FLOPS_PER_PARAMETER * parameters * tokens)
        for _ in range(200):
            middle = (low + high) / 2
            too_high = self.predict(*self.optimum(np.exp(middle))) > goal
            low, high = (middle, high) if too_high else (low, middle)
        return float(FLOPS_PER_PARAMETER * parameters * tokens / np.exp(high))

    def format(self) -> str:
        """Return the constants and their standard errors as text."""
        parts = zip(("E", "A", "B", "alpha", "beta"), self.constants, self.errors, strict=True)
        return ", ".join(
            f"{name} = {value:.4g}" + ("" if np.isnan(error) else f" ± {error:.2g}")
            for name, value, error in parts
        )


# Published constants. The first, rounded ones of the paper give 32 billion parameters at Gopher's
# budget, where its text says 40: the second is the fit that agrees with its other approaches.
PUBLISHED = {
    "hoffmann": Law(1.69, 406.4, 410.7, 0.34, 0.28),
    "besiroglu": Law(1.8172, 482.01, 2085.43, 0.3478, 0.3658),
}


def _predict(constants: np.ndarray, parameters, tokens):
    E, A, B, alpha, beta = constants
    return E + A * parameters**-alpha + B * tokens**-beta


def predict_loss(parameters: float, tokens: float, law: str = "hoffmann") -> float:
    """Return the loss that a published law predicts, nats per token.

        predict_loss(1e9, 20e9)     2.580

    Args:
        law: in PUBLISHED.
    """
    return float(PUBLISHED[law].predict(parameters, tokens))


# --- fits ------------------------------------------------------------------------------------


def fit(runs: Sequence[Run], *, bootstrap: int = 0, seed: int = 0, delta: float = DELTA) -> Law:
    """Fit E + A / N^alpha + B / D^beta to runs: the Huber loss on the log of the loss, by L-BFGS.

    For given exponents the other constants are a linear problem, so that the starts are the best of
    a grid of exponents alone (variable projection). Everything is in float64.

    Args:
        bootstrap: how many times runs are resampled for the standard errors.
        seed: of the resampling.
        delta: where the Huber loss becomes linear.

    Raises:
        ConfigError: there are too few runs, they differ in one size only, or a number is invalid.
    """
    sizes, tokens, losses = check_runs(runs)
    best = _fit_from(sizes, tokens, losses, delta, _find_starts(sizes, tokens, losses))
    samples = None
    if bootstrap:
        rng, rows = np.random.default_rng(seed), list[np.ndarray]()
        while len(rows) < bootstrap:
            at = rng.integers(0, len(losses), len(losses))
            if len(set(sizes[at])) < 3 or len(set(tokens[at])) < 3:
                continue  # such a resample determines no exponents
            rows.append(_fit_from(sizes[at], tokens[at], losses[at], delta, [best]))
        samples = np.stack([_to_constants(row) for row in rows])
    E, A, B, alpha, beta = map(float, _to_constants(best))
    return Law(E, A, B, alpha, beta, samples, len(losses))


def check_runs(runs: Sequence[Run]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return N, D and losses, float64 [R] each.

    Raises:
        ConfigError: see `fit`.
    """
    if len(runs) < MIN_RUNS:
        raise ConfigError(
            f"{len(runs)} runs determine no law: it has 5 constants, give {MIN_RUNS} or more."
        )
    table = np.array([[run.parameters, run.tokens, run.loss] for run in runs], np.float64).T
    for run in runs:
        if not all(0 < x < np.inf for x in (run.parameters, run.tokens, run.loss)):
            raise ConfigError(
                f"the run {run.name or run} must have parameters, tokens and a loss above 0."
            )
    for values, name in zip(table[:2], ("parameters", "tokens"), strict=True):
        if len(set(values)) < 3:
            raise ConfigError(
                f"the runs have {len(set(values))} different numbers of {name}: an exponent needs "
                "3 or more."
            )
    return table[0], table[1], table[2]


def _find_starts(sizes, tokens, losses) -> list[np.ndarray]:
    """Return the best (log E, log A, log B, alpha, beta) over a grid of exponents."""
    found = []
    for alpha, beta in itertools.product(EXPONENTS, EXPONENTS):
        # Scaled to about 1, and by the losses: the squared relative error.
        columns = [np.ones_like(losses), (sizes / sizes.min()) ** -alpha,
                   (tokens / tokens.min()) ** -beta]  # fmt: skip
        found_linear, error = nnls(np.stack(columns, 1) / losses[:, None], np.ones_like(losses))
        E, A, B = np.maximum(found_linear, 1e-6)
        start = [np.log(E), np.log(A) + alpha * np.log(sizes.min()),
                 np.log(B) + beta * np.log(tokens.min()), alpha, beta]  # fmt: skip
        found.append((error, np.array(start)))
    return [start for _, start in sorted(found, key=lambda pair: pair[0])[:BEST_STARTS]]


def _fit_from(sizes, tokens, losses, delta: float, starts: Sequence[np.ndarray]) -> np.ndarray:
    """Return the best (log E, log A, log B, alpha, beta) that L-BFGS reaches from these starts."""
    log_sizes, log_tokens, log_losses = np.log(sizes), np.log(tokens), np.log(losses)
    # Centered, the constants and exponents are hardly correlated, and few steps are needed.
    middle_n, middle_d = log_sizes.mean(), log_tokens.mean()
    x, y = log_sizes - middle_n, log_tokens - middle_d

    def objective(p):
        terms = np.stack([np.full_like(x, p[0]), p[1] - p[3] * x, p[2] - p[4] * y])
        top = terms.max(0)
        weights = np.exp(terms - top)
        total = weights.sum(0)
        error = top + np.log(total) - log_losses
        slope = np.clip(error, -delta, delta)
        value = np.where(np.abs(error) <= delta, error**2 / 2, delta * (np.abs(error) - delta / 2))
        shares = weights / total * slope
        gradient = [shares[0].sum(), shares[1].sum(), shares[2].sum(),
                    -(shares[1] * x).sum(), -(shares[2] * y).sum()]  # fmt: skip
        # The Huber loss of small errors is tiny: scaled, the tolerances of L-BFGS mean something.
        return value.sum() / delta**2, np.array(gradient) / delta**2

    best = None
    for start in starts:
        p = start.copy()
        p[1] -= p[3] * middle_n
        p[2] -= p[4] * middle_d
        options = {"maxiter": 5000, "maxfun": 20000, "ftol": 1e-15, "gtol": 1e-10, "maxcor": 30}
        for _ in range(3):  # from where it stopped: the first steps of L-BFGS are rough
            found = minimize(objective, p, jac=True, method="L-BFGS-B", options=options)
            p = found.x
        if best is None or found.fun < best.fun:
            best = found
    assert best is not None
    p = best.x.copy()
    p[1] += p[3] * middle_n
    p[2] += p[4] * middle_d
    return p


def _to_constants(p: np.ndarray) -> np.ndarray:
    return np.array([*np.exp(p[:3]), *p[3:]])


# --- other laws and other ways to fit --------------------------------------------------------


@dataclass(frozen=True)
class PowerLaw:
    """y = coefficient * x^exponent."""

    coefficient: float
    exponent: float

    def __call__(self, x):
        return self.coefficient * np.asarray(x, float) ** self.exponent


def fit_power_law(x: Sequence[float], y: Sequence[float]) -> PowerLaw:
    """Fit y = c x^e by least squares on logarithms."""
    exponent, log_c = np.polyfit(np.log(x), np.log(y), 1)
    return PowerLaw(float(np.exp(log_c)), float(exponent))


@dataclass(frozen=True)
class IsoFlopFit:
    """Approach 2: the best size at each budget, and how it grows with the budget.

    Attributes:
        budgets: FLOPs [K]. sizes: the best N at each [K]. losses: there [K].
        parameters, tokens: N and D as power laws of the budget.
    """

    budgets: np.ndarray
    sizes: np.ndarray
    losses: np.ndarray
    parameters: PowerLaw
    tokens: PowerLaw


def fit_isoflop(runs: Sequence[Run], tolerance: float = 0.1) -> IsoFlopFit:
    """Fit a parabola of the loss over log N for each budget of FLOPs, and take its minimum.

    The minimum of a parabola is biased where the sizes are spread far, not centered on the best
    one, or alpha differs from beta: compare with `fit`.

    Args:
        tolerance: runs whose FLOPs differ by less than this share have the same budget.

    Raises:
        ConfigError: fewer than two budgets have three sizes around a minimum.

    Source: Hoffmann et al. 2022, section 3.2.
    """
    groups: list[list[Run]] = []
    for run in sorted(runs, key=lambda run: run.compute):
        if not groups or run.compute > groups[-1][0].compute * (1 + tolerance):
            groups.append([])
        groups[-1].append(run)
    found = []
    for group in groups:
        if len({run.parameters for run in group}) < 3:
            continue
        x = np.log([run.parameters for run in group])
        curve = np.polyfit(x - x.mean(), [run.loss for run in group], 2)
        if curve[0] <= 0:
            continue
        at = -curve[1] / (2 * curve[0])
        budget = float(np.exp(np.mean(np.log([run.compute for run in group]))))
        found.append((budget, float(np.exp(at + x.mean())), float(np.polyval(curve, at))))
    if len(found) < 2:
        raise ConfigError(
            f"{len(found)} budgets have three sizes or more around a minimum: approach 2 needs two."
        )
    budgets, sizes, losses = np.array(found).T
    tokens = budgets / (FLOPS_PER_PARAMETER * sizes)
    return IsoFlopFit(
        budgets, sizes, losses, fit_power_law(budgets, sizes), fit_power_law(budgets, tokens)
    )


@dataclass(frozen=True)
class KaplanLaw:
    """L(N, D) = ((N_c / N)^(alpha_n / alpha_d) + D_c / D)^alpha_d.

    The default constants are of the paper, with N without embeddings.

    Source: Kaplan et al. 2020, arXiv:2001.08361, equation 1.5.
    """

    N_c: float = 6.4e13
    D_c: float = 1.8e13
    alpha_n: float = 0.076
    alpha_d: float = 0.103

    def predict(self, parameters, tokens):
        """Return the loss, nats per token."""
        parameters, tokens = np.asarray(parameters, float), np.asarray(tokens, float)
        size = (self.N_c / parameters) ** (self.alpha_n / self.alpha_d)
        return (size + self.D_c / tokens) ** self.alpha_d

    def optimum_exponent(self) -> float:
        """Return e of N ~ C^e for the best use of FLOPs: 1/alpha_n over 1/alpha_n + 1/alpha_d."""
        return self.alpha_d / (self.alpha_n + self.alpha_d)


def leave_out(runs: Sequence[Run], names: Sequence[str]) -> list[Run]:
    """Return the runs without those of these names.

    Raises:
        ConfigError: there is no run of such a name.
    """
    if unknown := set(names) - {run.name for run in runs}:
        raise ConfigError(f"there is no run {sorted(unknown)[0]!r} to leave out.")
    return [run for run in runs if run.name not in set(names)]
