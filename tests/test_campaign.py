import os

import pytest
from campaign import campaign


@pytest.mark.slow
def test_kills_change_nothing_double_nothing_and_touch_nothing_else(tmp_path):
    """One in training here, three elsewhere; PUJAX_KILLS=200 takes an hour or so.

    So does `python tests/campaign.py 200`.
    """
    kills = int(os.environ.get("PUJAX_KILLS", "1"))
    campaign(tmp_path, tmp_path / "xla", kills=kills, seed=kills)
