"""The label store: a teacher's answers, written once and read for ever."""

from .store import LabelStore as LabelStore
