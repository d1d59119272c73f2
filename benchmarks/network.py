"""The network simulator: speed, ns-3 beside it on the same workload, and figures of papers.

python benchmarks/network.py [--ns3 PYTHON] [--htsim PROGRAM] [--only NAME …] [--json FILE]

PYTHON is an interpreter with the package `ns3` (pip install ns3); PROGRAM is htsim_swift of https://github.com/Broadcom/csg-htsim,
which `make` builds in sim and then in sim/datacenter. Events are counted differently by each simulator; compare data packets, or their
hops, a second of processor time.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np

from luban.core.config import from_dict, load_toml, override
from luban.netsim import SHIPPED
from luban.netsim.congestion.dcqcn import Dcqcn, DcqcnPaper
from luban.netsim.congestion.dctcp import Dctcp
from luban.netsim.congestion.hpcc import Hpcc
from luban.netsim.congestion.newreno import NewReno
from luban.netsim.congestion.pint import Pint
from luban.netsim.congestion.swift import Swift
from luban.netsim.congestion.timely import Timely
from luban.netsim.flows import Flow
from luban.netsim.fluid import solve
from luban.netsim.results import ideal_seconds
from luban.netsim.scenario import Scenario
from luban.netsim.simulation import Simulation
from luban.netsim.switches import Switches
from luban.netsim.topology.clos import Clos, Star
from luban.netsim.topology.fat_tree import FatTree
from luban.netsim.workloads.permutation import Permutation
from luban.netsim.workloads.poisson import Poisson

MILLISECOND = 10**9
HTSIM_PACKETS = 501  # of a flow: it sends one more than it is asked for
SHORT = 7000  # bytes: flows of at most so many count as short


def speed() -> dict:
    """A permutation over HPCC's 320 hosts with everything on: INT, windows, pacing, PFC, ECN, samples."""
    network = Clos().network()
    found = {}
    for name, transport in (("hpcc", Hpcc()), ("dcqcn", Dcqcn()), ("dctcp", Dctcp(payload=1000, header=48))):
        flows = Permutation(bytes=10**9).flows(network, np.random.default_rng(0))
        simulation = Simulation(network, flows, transport, watch_busiest=8, sample_every=10**6)
        simulation.run(10**6)  # the machine code is loaded or compiled
        began = time.process_time()
        outcome = simulation.run(MILLISECOND // 2)
        cpu = time.process_time() - began
        found[name] = {
            "events_per_second": outcome.events / cpu,
            "delivered_per_second": outcome.delivered / cpu,
            "hops_per_second": outcome.hops / cpu,
            "cpu_seconds": cpu,
        }
    return found


def dctcp_queue(flows: int, seconds: float, ack_every: int) -> dict:
    """`flows` long DCTCP flows into one port of 10 Gb/s, marked from 65 packets on."""
    marks = 65 * 1500
    switches = Switches(
        flow_control="lossy", buffer_bytes=10**7, mark_low_bytes=marks, mark_high_bytes=marks, mark_at="enqueue"
    )
    scenario = {
        "topology": {"type": "star", "hosts": flows + 1, "host_gbps": 10.0, "delay_us": 10.0},
        "workload": {"type": "incast", "senders": flows, "bytes": 10**10},
        "transport": {"type": "dctcp", "ack_every": ack_every},
        "run": {"sample_us": 10.0, "watch": ["switch→host0"]},
    }
    simulation = from_dict(Scenario, {**scenario, "switch": switches}).prepare()
    simulation.run(10**6)
    began = time.process_time()
    outcome = simulation.run(round(seconds * 1e12))
    cpu = time.process_time() - began
    times, ports, _ = simulation.samples()
    queue = ports[times >= seconds / 2, 0, 0] / 1500
    return {
        "queue_packets": {f"p{p}": float(np.percentile(queue, p)) for p in (5, 50, 95)},
        "goodput_gbps": float(simulation.state.flows["received"].sum()) * 8 / seconds / 1e9,
        "events": outcome.events,
        "data_packets": outcome.delivered,
        "seconds": cpu,
    }


def ns3(python: str, *words: object, patience: float = 300.0) -> dict:
    """What the script beside this one says, run on ns-3."""
    script = str(Path(__file__).with_name("network_ns3.py"))
    done = subprocess.run(
        [python, script, *map(str, words)], capture_output=True, text=True, check=True, timeout=patience
    )
    return json.loads(done.stdout.splitlines()[-1])


def dctcp_beside_ns3(python: str) -> dict:
    """The same on ns-3, with an acknowledgement for each packet and, as its default is, for every second."""
    found = {}
    for flows in (20, 40):
        for every in (1, 2):
            # Its classic recovery is the one here; with an acknowledgement for two packets that hangs in ns-3 for some numbers.
            recovery = "classic" if every == 1 else "prr"
            theirs, ours = ns3(python, "dctcp", flows, 0.1, every, recovery), dctcp_queue(flows, 0.1, every)
            rates = [x["data_packets"] / x["seconds"] for x in (ours, theirs)]
            for x, rate in zip((ours, theirs), rates, strict=True):
                x["data_packet_hops_per_second"] = 2 * rate  # over two links each
            key = f"{flows} flows, an acknowledgement for {every}"
            found[key] = {"luban": ours, "ns3": theirs, "times_faster": rates[0] / rates[1]}
    return found


def swift_beside_htsim(program: str, seeds: int = 5) -> dict:
    """Mean completion time of incasts of 2 MB each into one of 16 hosts of a fat-tree, senders starting within 100 µs."""
    found = {}
    for senders in (4, 8, 15):
        ours, theirs = [], []
        for seed in range(seeds):
            draw = random.Random(seed)
            starts = {host: draw.randrange(100) for host in draw.sample(range(1, 16), senders)}  # µs
            ours.append(_swift_seconds(starts))
            theirs.append(_htsim_seconds(program, starts))
        mean = float(np.mean(ours)), float(np.mean(theirs))
        found[f"{senders} senders"] = {"luban": mean[0], "htsim": mean[1], "ratio": mean[0] / mean[1]}
    return found


def _swift_seconds(starts: dict[int, int]) -> float:
    """Mean completion time, the target as htsim has it: a hop more than here, as it counts links, and packets of 4000 bytes."""
    hop = 20.0 / 6.55
    target = {"base_us": 20.0 + hop, "per_hop_us": hop, "fs_range": 100.0 / (20.0 + hop)}
    transport = Swift(payload=3960, header=40, ack_size=40, start_window=10.0, rto_us=100.0, **target)
    flows = [Flow(host, 0, HTSIM_PACKETS * 3960, start=start * 10**6) for host, start in starts.items()]
    switches = Switches(flow_control="lossy", buffer_bytes=10**8, port_bytes=4_000_000, alpha=100.0)
    simulation = Simulation(FatTree(k=4).network(), flows, transport, switches)
    simulation.run()
    return float(simulation.completion_times().mean())


def _htsim_seconds(program: str, starts: dict[int, int]) -> float:
    """The same by htsim."""
    with tempfile.TemporaryDirectory() as folder:
        lines = [f"{host}->0 start {start} size {HTSIM_PACKETS * 4000}" for host, start in starts.items()]
        matrix = Path(folder) / "matrix.cm"
        matrix.write_text("\n".join(["Nodes 16", f"Connections {len(lines)}", *lines]) + "\n", encoding="utf-8")
        words = [
            program,
            "-tm",
            str(matrix),
            "-o",
            f"{folder}/log",
            "-nodes",
            "16",
            "-linkspeed",
            "100000",
            "-mtu",
            "4000",
        ]
        words += ["-flowsize", str(HTSIM_PACKETS - 1), "-cwnd", "10", "-q", "1000", "-end", "50000"]
        done = subprocess.run(words, capture_output=True, text=True, check=True, cwd=folder)
    ends = re.findall(r"Flow swift_(\d+)_0 finished at ([\d.]+)", done.stdout)
    if len(ends) != len(starts):
        raise RuntimeError(f"htsim finished {len(ends)} of {len(starts)} flows")
    return float(np.mean([1e-6 * (float(end) - starts[int(host)]) for host, end in ends]))


def incast_seconds(senders: int, seed: int, receive: int, sack: bool) -> float:
    """Seconds until 1 MB in equal parts has come through a port of 100 packets at 1 Gb/s, senders starting within 50 µs."""
    switches = Switches(flow_control="lossy", buffer_bytes=10**7, port_bytes=150_000)
    how = {"recovery": "selective"} if sack else {"ack_every": 2}
    transport = NewReno(receive_window=receive, **how)
    draw = random.Random(seed)
    flows = [Flow(i + 1, 0, 10**6 // senders, start=int(draw.uniform(0, 50e6))) for i in range(senders)]
    simulation = Simulation(
        Star(hosts=senders + 1, host_gbps=1.0, delay_us=25.0).network(), flows, transport, switches, seed=seed
    )
    simulation.run()
    return simulation.makespan()


def _ns3_incast(python: str, senders: int, seed: int, receive: int, sack: bool) -> float | None:
    """Seconds; None where ns-3 itself does not end, as it does for some seeds."""
    try:
        return ns3(python, "incast", senders, seed, 2, receive, int(sack), patience=60.0)["seconds"]
    except subprocess.TimeoutExpired:
        return None


def incast_onset(python: str | None) -> dict:
    """By recovery and receive window: of seven runs with each number of senders, in how many a timeout made 8 ms more than 100."""
    found = {}
    for sack in (True, False):
        for receive in (4 << 20, 65536):
            key = f"{'SACK' if sack else 'NewReno'}, window {receive // 1024} kB"
            counts: dict[str, dict[int, object]] = {"luban": {}}
            for senders in (2, 3, 4, 5, 6, 8, 10, 12, 16):
                ours = [incast_seconds(senders, seed, receive, sack) for seed in range(7)]
                counts["luban"][senders] = sum(x > 0.1 for x in ours)
                if python:
                    theirs = [_ns3_incast(python, senders, seed, receive, sack) for seed in range(3)]
                    ended = [x for x in theirs if x is not None]
                    counts.setdefault("ns3", {})[senders] = f"{sum(x > 0.1 for x in ended)} of {len(ended)}"
            found[key] = counts
    return found


def hosts_320(load: float, duration_us: float = 1000.0) -> dict:
    """Hadoop's flow sizes over 320 hosts with incasts of 60 senders: slowdown of short flows under each congestion control."""
    found = {}
    network = Clos().network()
    workload = Poisson(sizes="hadoop", load=load, duration_us=duration_us, incast_load=0.02)
    transports = {
        "hpcc": Hpcc(),
        "pint": Pint(),
        "pint 1/16": Pint(share=1 / 16),
        "pint 1/256": Pint(share=1 / 256),
        "dcqcn": Dcqcn(),
        "dctcp": Dctcp(
            payload=1000, header=48, recovery="go_back_n", rto_us=4000.0, initial_window=163.0
        ),  # at line rate
        "timely": Timely(),
        "swift": Swift(),
    }
    for name, transport in transports.items():
        flows = workload.flows(network, np.random.default_rng(1))
        simulation = Simulation(network, flows, transport, base_rtt=13 * 10**6, seed=1)
        outcome = simulation.run(round(20 * duration_us * 1e6))
        times = simulation.completion_times()
        every = [i for i, f in enumerate(flows) if f.label == "hadoop" and f.size <= SHORT]
        short = [i for i in every if not np.isnan(times[i])]
        slow = np.array([times[i] / ideal_seconds(simulation, i) for i in short])
        ports = simulation.state.ports
        found[name] = {
            "short_flows": len(short),
            "unfinished_short_flows": len(every) - len(short),
            "median_slowdown": float(np.median(slow)),
            "p99_slowdown": float(np.percentile(slow, 99)),
            "max_queue_kb": float(ports["max_queue"].max()) / 1e3,
            "pauses": int(ports["pauses"].sum()),
            "drops": int(ports["drops"].sum()),
            "seconds": outcome.seconds,
        }
    return found


def dcqcn_20_to_1() -> dict:
    """The queue of 20 long flows at 40 Gb/s under DCQCN with the paper's parameters, and under DCTCP marked at 160 kB."""
    found = {}
    marks = Switches(flow_control="lossy", mark_low_bytes=160_000, mark_high_bytes=160_000)
    for name, transport, switches, end in (("dcqcn", DcqcnPaper(), Switches(), 400), ("dctcp", Dctcp(), marks, 40)):
        network = Star(hosts=21, host_gbps=40.0).network()
        flows = [Flow(i + 1, 0, 10**11) for i in range(20)]
        simulation = Simulation(network, flows, transport, switches, watched_ports=[1], sample_every=10**7)
        simulation.run(end * MILLISECOND)
        queue = simulation.samples()[1][:, 0, 0]
        found[name] = float(np.percentile(queue[len(queue) // 2 :], 90)) / 1e3
    return {"p90_queue_kb": found}


def swift_5000_to_1() -> dict:
    """5000 Swift flows into one port of 100 Gb/s: of the whole run, and of its second half."""
    scenario = from_dict(Scenario, override(load_toml(SHIPPED / "swift_incast.toml", SHIPPED), []))
    simulation = scenario.prepare()
    outcome = scenario.execute(simulation)
    times, ports, _ = simulation.samples()
    half, state = len(times) // 2, simulation.state
    sent = float(ports[-1, 0, 1] - ports[half, 0, 1]) * 8 / (times[-1] - times[half])
    return {
        "link_use": float(state.ports["tx_bytes"][1]) * 8 / outcome.simulated / 100e9,
        "link_use_second_half": sent / 100e9,
        "goodput_share": float(state.flows["received"].sum()) * 8 / outcome.simulated / 100e9,
        "p50_queue_mb": float(np.median(ports[:, 0, 0])) / 1e6,
        "p50_queue_mb_second_half": float(np.median(ports[half:, 0, 0])) / 1e6,
        "drops": int(state.ports["drops"].sum()),
        "events_per_second": outcome.events / outcome.seconds,
    }


def fluid_16384() -> dict:
    """Max-min rates of a hashed permutation among 16,384 GPUs over rails."""
    rng = np.random.default_rng(0)
    hosts, per_leaf, spines, gpus = 16384, 32, 32, 8
    leaves = hosts // per_leaf
    to = np.roll(np.arange(hosts), 1)[rng.permutation(hosts)]
    leaf = (np.arange(hosts) // gpus // per_leaf) * gpus + np.arange(hosts) % gpus
    spine = rng.integers(spines, size=hosts)
    up = 2 * hosts + leaf * spines + spine
    down = 2 * hosts + (leaves + leaf[to]) * spines + spine
    links = np.stack([np.arange(hosts), hosts + to, up, down], axis=1).astype(np.int32).ravel()
    start = np.arange(0, 4 * hosts + 1, 4)
    capacity = np.ones(2 * hosts + 2 * leaves * spines)
    solve(start, links, capacity)
    took = []
    for _ in range(5):
        began = time.process_time()
        rates = solve(start, links, capacity)
        took.append(time.process_time() - began)
    return {"milliseconds": 1e3 * float(np.median(took)), "mean_rate": float(rates.mean())}


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ns3", help="a Python that has the package ns3")
    parser.add_argument("--htsim", help="htsim's program for Swift")
    parser.add_argument("--only", nargs="*", help="names of the parts to run")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    parts = {
        "speed": speed,
        "fluid_16384": fluid_16384,
        "dcqcn_20_to_1": dcqcn_20_to_1,
        "swift_5000_to_1": swift_5000_to_1,
        "incast_onset": lambda: incast_onset(args.ns3),
        "hosts_320_at_30": lambda: hosts_320(0.3),
        "hosts_320_at_50": lambda: hosts_320(0.5, 500.0),
    }
    if args.htsim:
        parts["htsim"] = lambda: swift_beside_htsim(args.htsim)
    if args.ns3:
        parts["ns3"] = lambda: dctcp_beside_ns3(args.ns3)
    found = {}
    for name, part in parts.items():
        if not args.only or name in args.only:
            found[name] = part()
            print(name, json.dumps(found[name], indent=2), flush=True)
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
