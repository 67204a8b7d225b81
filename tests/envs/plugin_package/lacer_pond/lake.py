"""Environments that a function registers."""

from lacer.envs import register_env


def register():
    register_env("pond/Lake-v0", "lacer_pond:Frogs", "a larger pond", sources={"frogs": "set"}, horizon=12)
