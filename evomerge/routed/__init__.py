"""Adapters of one base as experts, whose outputs routers mix anew for every token: the models of routed recipes."""
