"""The kinds of task, one file each. `Classify` shows what all of them offer."""

from kinds.classify import Classify
from kinds.generate import Generate
from kinds.score import Score
from kinds.span import Span
from kinds.tag import Tag

KINDS = {kind.name: kind for kind in (Classify, Score, Span, Tag, Generate)}
