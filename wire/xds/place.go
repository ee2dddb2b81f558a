package xds

import (
	"fmt"
	"math"
	"net/netip"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"tacit.dev/mesh"
	"tacit.dev/wire/xds/message"
)

// What Istio has no words for stands in extensions, which its clients skip. What is no pod
// is to them a workload of the host's network, to which no address leads.
const (
	// listedExtension says mesh.Workload.Listed and Of.
	listedExtension = "tacit.dev/listed"
	// placeExtension makes a Workload a mesh.Place.
	placeExtension = "tacit.dev/place"
	// hostPortsExtension says mesh.Workload.HostPorts.
	hostPortsExtension = "tacit.dev/host-ports"
	// externalExtension on a Service says External, NodePorts and NodeLocal.
	externalExtension = "tacit.dev/external"
)

// maxRanges bounds those of one place; a node has one of each family.
const maxRanges = 1024

func newExtension(name string, config proto.Message) (*message.Extension, error) {
	a, err := anypb.New(config)
	return &message.Extension{Name: name, Config: a}, err
}

// extended reads the extension of that name into config, and reports whether it is there.
func extended(extensions []*message.Extension, name string, config proto.Message) (is bool, err error) {
	for _, e := range extensions {
		if e.GetName() != name {
			continue
		}
		is = true
		if c := e.GetConfig(); c != nil {
			if err := c.UnmarshalTo(config); err != nil {
				return false, fmt.Errorf("extension %s: %w", name, err)
			}
		}
	}
	return is, nil
}

func encodePlace(p *mesh.Place) (*message.Address, error) {
	addresses, err := encodeAddrs(p.Addresses)
	if err != nil {
		return nil, err
	}
	config := &message.Place{Contested: p.Contested}
	for _, r := range p.Ranges {
		config.Ranges = append(config.Ranges, &message.Range{Address: r.Addr().AsSlice(), Length: uint32(r.Bits())})
	}
	if n := p.NodePorts; n != (mesh.NodePorts{}) {
		config.NodePorts = []uint32{uint32(n.First), uint32(n.Last)}
	}
	config.Trust = encodeTrust(p.Trust)
	e, err := newExtension(placeExtension, config)
	return &message.Address{Type: &message.Address_Workload{Workload: &message.Workload{
		Uid: p.Name, Node: p.Node, Addresses: addresses, NetworkMode: message.NetworkMode_HOST_NETWORK,
		Status: message.WorkloadStatus_UNHEALTHY, Extensions: []*message.Extension{e},
	}}}, err
}

// decodePlace returns nil for a Workload that is one.
func decodePlace(m *message.Workload) (*mesh.Place, error) {
	config := &message.Place{}
	is, err := extended(m.GetExtensions(), placeExtension, config)
	if err != nil || !is {
		return nil, err
	}
	if m.GetUid() == "" || len(config.GetRanges()) > maxRanges {
		return nil, fmt.Errorf("place %q with %d ranges: want a name, and at most %d", m.GetUid(), len(config.GetRanges()), maxRanges)
	}
	p := &mesh.Place{Name: m.GetUid(), Node: m.GetNode(), Contested: config.GetContested()}
	if p.Addresses, err = decodeAddrs(m.GetAddresses()); err != nil {
		return nil, err
	}
	for _, r := range config.GetRanges() {
		a, ok := netip.AddrFromSlice(r.GetAddress())
		if !ok || r.GetLength() == 0 || r.GetLength() > uint32(a.BitLen()) {
			return nil, fmt.Errorf("range of %d bytes / %d bits: want an address and its prefix", len(r.GetAddress()), r.GetLength())
		}
		p.Ranges = append(p.Ranges, netip.PrefixFrom(a, int(r.GetLength())))
	}
	if p.NodePorts, err = decodeNodePorts(config.GetNodePorts()); err != nil {
		return nil, err
	}
	p.Trust, err = decodeTrust(config.GetTrust())
	return p, err
}

func decodeNodePorts(list []uint32) (r mesh.NodePorts, err error) {
	if len(list) == 0 {
		return r, nil
	}
	numbers, err := decodeNumbers(list[:min(len(list), 3)])
	if err != nil {
		return r, fmt.Errorf("ports of nodes: %w", err)
	}
	if len(numbers) != 2 || numbers[0] > numbers[1] {
		return r, fmt.Errorf("ports of nodes %v: want the first and the last", numbers)
	}
	return mesh.NodePorts{First: numbers[0], Last: numbers[1]}, nil
}

func encodeHostPorts(list []mesh.HostPort) (*message.Extension, error) {
	config := &message.HostPorts{}
	for _, p := range list {
		x := &message.HostPort{Port: uint32(p.Port), Target: uint32(p.Target)}
		if p.Address.IsValid() {
			x.Address = p.Address.Unmap().AsSlice()
		}
		config.Ports = append(config.Ports, x)
	}
	return newExtension(hostPortsExtension, config)
}

func decodeHostPorts(extensions []*message.Extension) (all []mesh.HostPort, err error) {
	config := &message.HostPorts{}
	if _, err := extended(extensions, hostPortsExtension, config); err != nil {
		return nil, err
	}
	for _, x := range config.GetPorts() {
		numbers, err := decodeNumbers([]uint32{x.GetPort(), x.GetTarget()})
		if err != nil {
			return nil, fmt.Errorf("port of the host: %w", err)
		}
		p := mesh.HostPort{Port: numbers[0], Target: numbers[1]}
		if len(x.GetAddress()) > 0 {
			one, err := decodeAddrs([][]byte{x.GetAddress()})
			if err != nil {
				return nil, err
			}
			p.Address = one[0]
		}
		all = append(all, p)
	}
	return all, nil
}

// encodeExternal returns nil for a service that is reached by its own addresses alone.
func encodeExternal(s *mesh.Service) (*message.Extension, error) {
	if len(s.External) == 0 && len(s.NodePorts) == 0 && !s.NodeLocal && s.HealthPort == 0 {
		return nil, nil
	}
	addresses, err := encodeAddrs(s.External)
	if err != nil {
		return nil, err
	}
	config := &message.External{Addresses: addresses, NodeLocal: s.NodeLocal, HealthPort: uint32(s.HealthPort)}
	for _, p := range s.NodePorts {
		config.NodePorts = append(config.NodePorts, &message.NodePort{Node: uint32(p.Node), Service: uint32(p.Service)})
	}
	return newExtension(externalExtension, config)
}

func decodeExternal(s *mesh.Service, extensions []*message.Extension) (err error) {
	config := &message.External{}
	if _, err := extended(extensions, externalExtension, config); err != nil {
		return err
	}
	if config.GetHealthPort() > math.MaxUint16 {
		return fmt.Errorf("port of kube-proxy %d: want at most 65535", config.GetHealthPort())
	}
	s.NodeLocal, s.HealthPort = config.GetNodeLocal(), uint16(config.GetHealthPort())
	if s.External, err = decodeAddrs(config.GetAddresses()); err != nil {
		return err
	}
	for _, p := range config.GetNodePorts() {
		numbers, err := decodeNumbers([]uint32{p.GetNode(), p.GetService()})
		if err != nil {
			return fmt.Errorf("port of the nodes: %w", err)
		}
		s.NodePorts = append(s.NodePorts, mesh.NodePort{Node: numbers[0], Service: numbers[1]})
	}
	return nil
}
