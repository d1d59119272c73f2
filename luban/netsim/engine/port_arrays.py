"""Records of ports, queues and nodes, from a network and its switches."""

from __future__ import annotations

import numpy as np

from luban.core.errors import ConfigError
from luban.netsim.congestion.base import Transport
from luban.netsim.engine import layout as at
from luban.netsim.switches import KINDS, Switches
from luban.netsim.topology.network import Network

UNLIMITED = 1 << 60


def port_arrays(network: Network, switches: Switches, transport: Transport, classes: int):
    """Ports, queues and nodes, and the fastest host port's rate; `classes` of traffic are in use."""
    ports = np.zeros(2 * len(network.links), at.port_type)
    queues = np.zeros(len(ports) * at.CLASSES, at.queue_type)
    nodes = np.zeros(len(network.names), at.node_type)
    packet = transport.payload + transport.header
    host_rate = network.nic_rate()
    buffer = switches.buffer(host_rate)
    for name, given in (("buffer_bytes", buffer), ("port_bytes", switches.port_bytes or buffer)):
        if given < packet:
            raise ConfigError(
                f"switch.{name} {given} holds no packet: one has {packet} bytes (transport.payload and header), so that at least "
                f"{packet} are needed"
            )
    nodes["is_switch"] = network.switches
    nodes["buffer"], nodes["alpha"], nodes["reserve"] = buffer, switches.alpha, switches.reserve_bytes
    nodes["flow_control"] = KINDS[switches.flow_control]
    nodes["flow_control"][list(network.inside)] = at.CREDITS
    nodes["reports"] = [network.is_fabric(node) for node in range(len(nodes))]
    for name in ("pipe_head", "pipe_tail"):
        ports[name] = -1
    ports["next_class"] = 1
    for name in ("head", "tail", "ready_head", "ready_tail"):
        queues[name] = -1
    quantum = np.array([1.0, *switches.class_weights])
    queues["quantum"] = np.tile(np.round(quantum / quantum[1:].min() * packet), len(ports))
    queues["credits"] = UNLIMITED
    for index in range(len(ports)):
        _fill_port(ports[index], index, network, switches, transport, host_rate)
        nodes["kept"][ports[index]["peer"]] += classes * (ports[index]["headroom"] + switches.reserve_bytes)
        peer = nodes[ports[index]["peer"]]
        if peer["is_switch"] and peer["flow_control"] == at.CREDITS:
            link, credits = network.links[index >> 1], switches.credit_bytes
            if ports[index]["peer"] in network.inside:
                credits = switches.inside_credits(link.rate, link.delay, packet)
            queues["credits"][index * at.CLASSES : (index + 1) * at.CLASSES] = credits
    if (nodes["flow_control"] == at.CREDITS).any() and switches.credit_bytes < 2 * packet:
        raise ConfigError(f"switch.credit_bytes {switches.credit_bytes}: two packets of {packet} bytes are the least")
    for node in np.flatnonzero(
        nodes["is_switch"] & (nodes["kept"] > nodes["buffer"]) & (nodes["flow_control"] == at.PFC)
    ):
        raise ConfigError(
            f"switch {network.names[node]}: headroom and reserve of its ports need {nodes['kept'][node]} bytes, "
            f"and the buffer has {buffer}: use --switch.buffer_bytes {2 * nodes['kept'][node]}"
        )
    return ports, queues, nodes, host_rate


def _fill_port(port, index: int, network: Network, switches: Switches, transport: Transport, host_rate: int):
    link = network.links[index >> 1]
    port["node"], port["peer"] = network.ends(index)
    port["rate"], port["delay"] = link.rate, link.delay
    port["limit"], port["down"] = switches.port_bytes, index >> 1 in network.failed
    if network.is_fabric(port["node"]):
        low, high, share = switches.marks(link.rate, transport.marks(link.rate))
        port["mark_low"], port["mark_high"], port["mark_share"] = low, high, share
    port["shift"] = switches.shift(link.rate, host_rate)
    if switches.flow_control == "pfc" and network.is_fabric(port["peer"]):
        packet = transport.payload + transport.header
        port["headroom"] = switches.headroom(link.rate, link.delay, packet, network.port_name(index))
