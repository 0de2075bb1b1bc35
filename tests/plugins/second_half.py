"""An objective: predict only the second half of every window, given the first."""

import numpy as np

from jaxgpt.data.tasks import CausalTask
from jaxgpt.objectives import OBJECTIVES, Objective, next_token_loss


class SecondHalfTask(CausalTask):
    """Windows whose first half has no weight in the loss."""

    def transform(self, batch, rngs):
        is_predicted = np.arange(self.T) >= self.T // 2
        return batch._replace(weights=batch.weights * is_predicted)


OBJECTIVES["second_half"] = Objective(SecondHalfTask, next_token_loss, family="decoder")
