"""The doctor: a few training steps of a model on random or given data, and what its gradients say.

``examine`` is the examination, ``command`` the command line around it.
"""

from .examination import Examination, Patient, examine

__all__ = ["Examination", "Patient", "examine"]
