"""Rematerialisation: policies of single layers, and schedules over all layers of a stack."""

from luban.parallel.remat.policies import remat_policy as remat_policy
from luban.planner.remat.rotor import rotor as rotor  # public: luban.parallel.remat.rotor
