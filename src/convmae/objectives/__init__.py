"""What pretraining asks: what is masked, what goes in, what is predicted, the loss. One file each, one line here."""

from convmae.objectives.masked import ConvMAE
from convmae.objectives.objective import Objective

OBJECTIVES: dict[str, type[Objective]] = {"convmae": ConvMAE}
"""All objectives by the names that weights files record."""
