"""Serving on spot replicas: which zone, how many, and how much on-demand beside them.

Mao et al., "SkyServe: Serving AI Models across Regions and Clouds with Spot Instances" (arXiv 2411.01438), with a
placement of our own that no zone starves under.

`view` says what a policy sees and answers. `autoscaling` says how many replicas are wanted, `mixture` how many of them
spot and on-demand, `placement` in which zones; `policy.ServingPolicy` is one of each, and runs unchanged in the
simulator and in the controller of live replicas. It never reads a trace.

`traces` loads what zones had to give and `synthetic` makes such traces up; `simulator` runs a policy on one for its
availability and cost, `latency` sends requests through what was ready, `omniscient` bounds the cost of any policy from
below, and `evaluation` does all of it over many windows.
"""
