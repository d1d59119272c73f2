"""TCP on ns-3: run by benchmarks/network.py with a Python that has the package `ns3`.

python network_ns3.py dctcp FLOWS SECONDS ACK_EVERY RECOVERY → one line of JSON: long DCTCP flows into one port; queue percentiles in
packets, goodput, events, processor seconds. RECOVERY: classic, as RFC 6582 and Luban have it, or prr, ns-3's default.
python network_ns3.py incast SENDERS SEED ACK_EVERY RECEIVE_BYTES SACK → 1 MB in equal parts over a port of 100 packets at 1 Gb/s, NewReno;
seconds until the last byte.
"""

import json
import random
import sys
import time

from ns import ns

SAMPLER = """
#include <vector>
#include "ns3/simulator.h"
#include "ns3/queue-disc.h"
namespace ns3 {
std::vector<uint32_t> g_samples;
void SampleQueue(Ptr<QueueDisc> q, Time every) {
  g_samples.push_back(q->GetNPackets());
  Simulator::Schedule(every, &SampleQueue, q, every);
}
void StartSampling(Ptr<QueueDisc> q, Time first, Time every) { Simulator::Schedule(first, &SampleQueue, q, every); }
void StopAt(Ptr<PacketSink> sink, uint64_t bytes, Time every) {
  if (sink->GetTotalRx() >= bytes) { Simulator::Stop(); return; }
  Simulator::Schedule(every, &StopAt, sink, bytes, every);
}
}
"""
RATE, DELAY, THRESHOLD, SEGMENT = "10Gbps", "10us", 65, 1448
INCAST_BYTES, INCAST_PACKETS, INCAST_SPREAD = (
    10**6,
    100,
    50e-6,
)  # of all senders; of the port; seconds in which they start


def configure(kind, ack_every, receive=4 << 20):
    """The transport, by ns-3's defaults where the comparison doesn't say otherwise."""
    set_default = ns.Config.SetDefault
    set_default("ns3::TcpL4Protocol::SocketType", ns.StringValue(f"ns3::{kind}"))
    set_default("ns3::TcpSocket::SegmentSize", ns.UintegerValue(SEGMENT))
    set_default("ns3::TcpSocket::SndBufSize", ns.UintegerValue(4 << 20))
    set_default("ns3::TcpSocket::RcvBufSize", ns.UintegerValue(receive))
    set_default("ns3::TcpSocket::DelAckCount", ns.UintegerValue(ack_every))


def configure_marks():
    """One threshold of DCTCP."""
    set_default = ns.Config.SetDefault
    set_default("ns3::RedQueueDisc::UseEcn", ns.BooleanValue(True))
    set_default("ns3::RedQueueDisc::UseHardDrop", ns.BooleanValue(False))
    # Without this every second threshold's worth of queue would be marked by chance only: not a step.
    set_default("ns3::RedQueueDisc::Gentle", ns.BooleanValue(False))
    set_default("ns3::RedQueueDisc::QW", ns.DoubleValue(1.0))
    set_default("ns3::RedQueueDisc::MinTh", ns.DoubleValue(THRESHOLD))
    set_default("ns3::RedQueueDisc::MaxTh", ns.DoubleValue(THRESHOLD))
    set_default("ns3::RedQueueDisc::MaxSize", ns.QueueSizeValue(ns.QueueSize("5000p")))


def star(senders, rate, delay, disc):
    """(sinks, queue disciplines, senders' nodes, address): hosts around a switch, the last one receives."""
    nodes, switch, receiver = ns.NodeContainer(), ns.NodeContainer(), ns.NodeContainer()
    nodes.Create(senders)
    switch.Create(1)
    receiver.Create(1)
    link = ns.PointToPointHelper()
    link.SetDeviceAttribute("DataRate", ns.StringValue(rate))
    link.SetChannelAttribute("Delay", ns.StringValue(delay))
    link.SetQueue("ns3::DropTailQueue", "MaxSize", ns.QueueSizeValue(ns.QueueSize("1p")))
    stack = ns.InternetStackHelper()
    stack.InstallAll()
    out = link.Install(switch.Get(0), receiver.Get(0))
    control = ns.TrafficControlHelper()
    control.SetRootQueueDisc(disc)
    discs = control.Install(ns.NetDeviceContainer(out.Get(0)))
    address = ns.Ipv4AddressHelper()
    address.SetBase(ns.Ipv4Address("10.200.0.0"), ns.Ipv4Mask("255.255.255.0"))
    target = address.Assign(out).GetAddress(1)
    for i in range(senders):
        devices = link.Install(nodes.Get(i), switch.Get(0))
        address.SetBase(ns.Ipv4Address(f"10.{i // 250}.{i % 250}.0"), ns.Ipv4Mask("255.255.255.0"))
        address.Assign(devices)
    ns.Ipv4GlobalRoutingHelper.PopulateRoutingTables()
    where = ns.InetSocketAddress(target, 9).ConvertTo()
    sinks = ns.PacketSinkHelper("ns3::TcpSocketFactory", where).Install(receiver.Get(0))
    return sinks, discs, nodes, where


def dctcp(flows, seconds, ack_every, recovery):
    """Long flows; queue samples of the second half."""
    configure("TcpDctcp", ack_every)
    kind = {"classic": "ns3::TcpClassicRecovery", "prr": "ns3::TcpPrrRecovery"}[recovery]
    ns.Config.SetDefault("ns3::TcpL4Protocol::RecoveryType", ns.TypeIdValue(ns.TypeId.LookupByName(kind)))
    configure_marks()
    ns.cppyy.cppdef(SAMPLER)
    sinks, discs, nodes, where = star(flows, RATE, DELAY, "ns3::RedQueueDisc")
    source = ns.BulkSendHelper("ns3::TcpSocketFactory", where)
    source.SetAttribute("MaxBytes", ns.UintegerValue(0))
    source.Install(nodes).Start(ns.Seconds(0))
    ns.StartSampling(discs.Get(0), ns.Seconds(seconds / 2), ns.MicroSeconds(10))
    ns.Simulator.Stop(ns.Seconds(seconds))
    began = time.process_time()
    ns.Simulator.Run()
    cpu = time.process_time() - began
    received = sinks.Get(0).GetObject[ns.PacketSink]().GetTotalRx()
    samples = sorted(ns.g_samples)
    result = {
        "queue_packets": {f"p{p}": samples[min(len(samples) - 1, len(samples) * p // 100)] for p in (5, 50, 95)},
        "goodput_gbps": received * 8 / seconds / 1e9,
        "events": int(ns.Simulator.GetEventCount()),
        "data_packets": received // SEGMENT,
        "seconds": cpu,
    }
    ns.Simulator.Destroy()
    return result


def incast(senders, seed, ack_every, receive, sack):
    """Seconds from the start until the last byte has arrived; senders start within 50 µs of each other."""
    configure("TcpNewReno", ack_every, receive)
    set_default = ns.Config.SetDefault
    set_default("ns3::TcpSocketBase::Sack", ns.BooleanValue(bool(sack)))
    set_default("ns3::TcpSocketBase::MinRto", ns.TimeValue(ns.MilliSeconds(300)))
    set_default("ns3::TcpSocketBase::ClockGranularity", ns.TimeValue(ns.MicroSeconds(1)))
    set_default("ns3::TcpSocket::ConnTimeout", ns.TimeValue(ns.MilliSeconds(300)))
    set_default("ns3::FifoQueueDisc::MaxSize", ns.QueueSizeValue(ns.QueueSize(f"{INCAST_PACKETS}p")))
    ns.cppyy.cppdef(SAMPLER)
    sinks, _, nodes, where = star(senders, "1Gbps", "25us", "ns3::FifoQueueDisc")
    draw = random.Random(seed)
    part = INCAST_BYTES // senders
    apps = []
    for i in range(senders):
        source = ns.BulkSendHelper("ns3::TcpSocketFactory", where)
        source.SetAttribute("MaxBytes", ns.UintegerValue(part))
        apps.append(source.Install(nodes.Get(i)))
        apps[-1].Start(ns.NanoSeconds(int(draw.uniform(0, INCAST_SPREAD) * 1e9)))
    ns.StopAt(sinks.Get(0).GetObject[ns.PacketSink](), part * senders, ns.MicroSeconds(10))
    ns.Simulator.Stop(ns.Seconds(30))
    ns.Simulator.Run()
    result = {"seconds": ns.Simulator.Now().GetSeconds()}
    ns.Simulator.Destroy()
    return result


if __name__ == "__main__":
    what, numbers = sys.argv[1], sys.argv[2:]
    if what == "incast":
        print(json.dumps(incast(*map(int, numbers))))
    else:
        print(json.dumps(dctcp(int(numbers[0]), float(numbers[1]), int(numbers[2]), numbers[3])))
