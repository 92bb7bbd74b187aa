import pytest
from campaign import CACHE, campaign


@pytest.mark.long
@pytest.mark.parametrize("kills", [1, 20])
def test_kills_change_nothing_double_nothing_and_touch_nothing_else(whole, tmp_path, kills):
    """One in training and two elsewhere; `python tests/campaign.py 200` takes an hour or so.

    Of many some come while a program is compiled, so they begin with none.
    """
    cache = CACHE if kills == 1 else tmp_path / "xla"
    campaign(tmp_path, whole[0], cache, kills=kills, seed=kills)
