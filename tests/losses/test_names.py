"""Every loss that has a name is compared with an oracle, and on meshes: no list forgets one."""

import matrix
import oracle
from fxdistill import losses
from fxdistill.losses.fused.formulas import DIVERGENCES
from fxdistill.losses.names import FEATURE_LOSSES, LABEL_LOSSES, LOGIT_LOSSES, OF_PLACES


def test_every_loss_of_places_is_in_the_oracle_and_in_the_matrix_of_placements():
    of_places = {f.__name__ for f in OF_PLACES} - {"detection_box"}  # smooth_l1, of boxes
    assert set(oracle.FEATURE_LOSSES) == of_places
    assert {name.partition("/")[0] for name in matrix.FEATURES} == of_places


def test_every_divergence_is_in_the_matrix_of_placements_and_in_the_fused_head():
    names = {name.partition("/")[0] for name in matrix.LOGITS}
    assert names == set(LOGIT_LOSSES) == set(DIVERGENCES)


def test_every_loss_by_name_is_public():
    names = {*FEATURE_LOSSES, *LOGIT_LOSSES, *LABEL_LOSSES}
    assert names <= set(losses.__all__)
    assert all(getattr(losses, name).__doc__ for name in names)
