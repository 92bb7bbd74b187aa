# The names that `import pujax` offers: each is imported from where this says when it is first used.
from pujax.files import weights as weights
from pujax.files.chat import Chat as Chat
from pujax.method import labels as labels
from pujax.method import losses as losses
from pujax.method import pair_losses as pair_losses
from pujax.method import scoring as scoring
from pujax.method.needs import needs_of as needs_of
from pujax.method.sampling import greedy as greedy
from pujax.method.sampling import sample as sample
from pujax.method.step import Recipe as Recipe
from pujax.method.step import anchor_group as anchor_group
from pujax.method.step import rollout as rollout
from pujax.method.step import update as update
from pujax.models.decoder import DecoderConfig as DecoderConfig
from pujax.models.decoder import LanguageModel as LanguageModel
from pujax.records import Sampling as Sampling
from pujax.records import messages_key as messages_key
from pujax.teacher.prompts import load_prompts as load_prompts
from pujax.teacher.store import read_anchors as read_anchors
from pujax.types import Batch as Batch
from pujax.types import Tokens as Tokens
from pujax.types import TrainState as TrainState
from pujax.types import right_padded as right_padded

__version__: str
__all__: list[str]
