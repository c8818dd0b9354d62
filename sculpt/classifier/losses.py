r"""The losses of a classifier: cross-entropies of its three heads, in nats.

.. math::
    \text{terminal} = -\log p(y \mid x), \qquad \text{marginal} = -\log p(y_1 \mid s), \qquad
    \text{joint} = - \sum_{y_2 \dots y_n} \Pi_{k \ge 2} \, \bar p_v(y_k \mid x) \; \log p(y_2, \dots, y_n \mid s, y_1)

for a state s of a trajectory of model y that ended in x. The teacher says what :math:`\bar p` is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from sculpt.classifier.heads import Classifier
    from sculpt.classifier.store import Batch

__all__ = ["cross_entropies", "terminal_cross_entropy"]


def cross_entropies(
    classifier: Classifier,
    batch: Batch,
    teacher: Classifier,
    log_odds: Float[Tensor, "c m"] | None = None,
    *,
    follow: bool = False,
) -> dict[str, Tensor]:
    """The losses ``terminal``, ``marginal`` and ``joint`` on a batch.

    Args:
        classifier: what learns.
        batch: what it learns from.
        teacher: what gives the label sets' targets.
        log_odds: of each state, where the classifier takes odds.
        follow: the terminal head learns from the teacher, too, and not from the labels.
    """
    y = batch.y[batch.owner]
    with torch.no_grad():
        taught = teacher.terminal(batch.x)
        log_p = taught[batch.owner]
        if log_odds is not None:
            log_p = torch.log_softmax(log_p + log_odds, dim=-1)
        target = classifier.set_head.target(log_p)
    features = classifier.network(*batch.states)
    rows = torch.arange(len(y), device=y.device)
    joint = classifier.set_head(features, log_odds, rows, batch.child if batch.child is not None else 0, y)
    return {
        "terminal": terminal_cross_entropy(classifier, batch, taught if follow else None),
        "marginal": F.cross_entropy(classifier.marginal_head(features).float(), y),
        "joint": -(target * joint).sum(-1).mean(),
    }


def terminal_cross_entropy(classifier: Classifier, batch: Batch, taught: Float[Tensor, "b m"] | None = None) -> Tensor:
    """The loss of the terminal head alone.

    Args:
        classifier: what learns.
        batch: finished samples and their labels.
        taught: log-probabilities to learn instead of the labels.
    """
    return F.cross_entropy(classifier.terminal(batch.x), batch.y if taught is None else taught.exp())
