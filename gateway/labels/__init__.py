"""Ground truth: predictions kept for it, and the labels that arrive later, joined by prediction id.

`ids` is the grammar of prediction ids and says which are kept; `target` what of an answer a label
is compared with; `rows` what goes into the tables and comes out; `store` the tables, in SQLite or
PostgreSQL (imported only where labels are on); `log` the thread that writes them; `reading` what
clients send.
"""

from gateway.labels.log import Asked, Observed, PredictionLog
from gateway.labels.rows import StoreError

__all__ = ["Asked", "Observed", "PredictionLog", "StoreError"]
