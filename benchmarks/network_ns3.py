"""DCTCP flows into one port on ns-3: run by benchmarks/network.py with a Python that has the package `ns3`.

python network_ns3.py FLOWS SECONDS → one line of JSON: queue percentiles in packets, goodput, events, wall-clock seconds.
"""

import json
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
}
"""
RATE, DELAY, THRESHOLD, SEGMENT = "10Gbps", "10us", 65, 1448


def configure():
    """DCTCP and its marking, by ns-3's defaults where the comparison doesn't say otherwise."""
    set_default = ns.Config.SetDefault
    set_default("ns3::TcpL4Protocol::SocketType", ns.StringValue("ns3::TcpDctcp"))
    set_default("ns3::TcpSocket::SegmentSize", ns.UintegerValue(SEGMENT))
    set_default("ns3::TcpSocket::SndBufSize", ns.UintegerValue(4 << 20))
    set_default("ns3::TcpSocket::RcvBufSize", ns.UintegerValue(4 << 20))
    set_default("ns3::RedQueueDisc::UseEcn", ns.BooleanValue(True))
    set_default("ns3::RedQueueDisc::UseHardDrop", ns.BooleanValue(False))
    # Without this every second threshold's worth of queue would be marked by chance only: not a step.
    set_default("ns3::RedQueueDisc::Gentle", ns.BooleanValue(False))
    set_default("ns3::RedQueueDisc::QW", ns.DoubleValue(1.0))
    set_default("ns3::RedQueueDisc::MinTh", ns.DoubleValue(THRESHOLD))
    set_default("ns3::RedQueueDisc::MaxTh", ns.DoubleValue(THRESHOLD))
    set_default("ns3::RedQueueDisc::MaxSize", ns.QueueSizeValue(ns.QueueSize("5000p")))


def run(flows, seconds):
    """The simulation; queue samples of the second half."""
    configure()
    ns.cppyy.cppdef(SAMPLER)
    nodes, switch, receiver = ns.NodeContainer(), ns.NodeContainer(), ns.NodeContainer()
    nodes.Create(flows)
    switch.Create(1)
    receiver.Create(1)
    link = ns.PointToPointHelper()
    link.SetDeviceAttribute("DataRate", ns.StringValue(RATE))
    link.SetChannelAttribute("Delay", ns.StringValue(DELAY))
    link.SetQueue("ns3::DropTailQueue", "MaxSize", ns.QueueSizeValue(ns.QueueSize("1p")))
    stack = ns.InternetStackHelper()
    stack.InstallAll()
    out = link.Install(switch.Get(0), receiver.Get(0))
    control = ns.TrafficControlHelper()
    control.SetRootQueueDisc("ns3::RedQueueDisc")
    discs = control.Install(ns.NetDeviceContainer(out.Get(0)))
    address = ns.Ipv4AddressHelper()
    address.SetBase(ns.Ipv4Address("10.200.0.0"), ns.Ipv4Mask("255.255.255.0"))
    target = address.Assign(out).GetAddress(1)
    for i in range(flows):
        devices = link.Install(nodes.Get(i), switch.Get(0))
        address.SetBase(ns.Ipv4Address(f"10.{i // 250}.{i % 250}.0"), ns.Ipv4Mask("255.255.255.0"))
        address.Assign(devices)
    ns.Ipv4GlobalRoutingHelper.PopulateRoutingTables()
    where = ns.InetSocketAddress(target, 9).ConvertTo()
    sink = ns.PacketSinkHelper("ns3::TcpSocketFactory", where)
    sinks = sink.Install(receiver.Get(0))
    source = ns.BulkSendHelper("ns3::TcpSocketFactory", where)
    source.SetAttribute("MaxBytes", ns.UintegerValue(0))
    source.Install(nodes).Start(ns.Seconds(0))
    ns.StartSampling(discs.Get(0), ns.Seconds(seconds / 2), ns.MicroSeconds(10))
    ns.Simulator.Stop(ns.Seconds(seconds))
    began = time.perf_counter()
    ns.Simulator.Run()
    wall = time.perf_counter() - began
    received = sinks.Get(0).GetObject[ns.PacketSink]().GetTotalRx()
    samples = sorted(ns.g_samples)
    result = {
        "queue_packets": {f"p{p}": samples[min(len(samples) - 1, len(samples) * p // 100)] for p in (5, 50, 95)},
        "goodput_gbps": received * 8 / seconds / 1e9,
        "events": int(ns.Simulator.GetEventCount()),
        "data_packets": received // SEGMENT,
        "seconds": wall,
    }
    ns.Simulator.Destroy()
    return result


if __name__ == "__main__":
    print(json.dumps(run(int(sys.argv[1]), float(sys.argv[2]))))
