package xds

import (
	"errors"
	"fmt"
	"net/netip"

	"tacit.dev/mesh"
	"tacit.dev/wire/xds/message"
)

// podType is a type of our own: no foreign client asks for it.
const podType = "type.googleapis.com/tacit.node.v1.Pod"

func encodePod(p mesh.Pod) (*message.Pod, error) {
	m := &message.Pod{Uid: p.UID, Namespace: p.Namespace, Name: p.Name, Identity: p.ID.String(), Enroll: p.Enroll}
	m.ExcludeOutbound = encodeExclusions(p.ExcludeOutbound)
	m.ExcludeInbound, m.ProbePorts = encodeNumbers(p.ExcludeInbound), encodeNumbers(p.ProbePorts)
	m.Known = encodeAddresses(p.Known)
	// What a node would refuse is not sent.
	_, err := decodePod(m)
	return m, err
}

func decodePod(m *message.Pod) (mesh.Pod, error) {
	p := mesh.Pod{UID: m.GetUid(), Namespace: m.GetNamespace(), Name: m.GetName(), Enroll: m.GetEnroll()}
	if p.UID == "" || p.Namespace == "" || p.Name == "" {
		return p, fmt.Errorf("pod %q of %q and %q: want uid, namespace and name", p.UID, p.Namespace, p.Name)
	}
	var err error
	if p.ID, err = mesh.ParseID(m.GetIdentity()); err != nil {
		return p, err
	}
	if p.ID.Namespace != p.Namespace {
		return p, fmt.Errorf("pod of namespace %q with identity %s", p.Namespace, p.ID)
	}
	if p.ExcludeOutbound, err = decodeExclusions(m.GetExcludeOutbound()); err != nil {
		return p, err
	}
	if p.ExcludeInbound, err = decodeNumbers(m.GetExcludeInbound()); err != nil {
		return p, fmt.Errorf("inbound exclusion: %w", err)
	}
	if p.ProbePorts, err = decodeNumbers(m.GetProbePorts()); err != nil {
		return p, fmt.Errorf("probe: %w", err)
	}
	if p.Known, err = decodeAddresses(m.GetKnown()); err != nil {
		return p, fmt.Errorf("pod that is known: %w", err)
	}
	return p, nil
}

func encodeAddresses(list []netip.Addr) (all [][]byte) {
	for _, a := range list {
		all = append(all, a.Unmap().AsSlice())
	}
	return all
}

// maxAddresses is far beyond what a pod has: one of each family.
const maxAddresses = 16

func decodeAddresses(list [][]byte) (all []netip.Addr, err error) {
	if len(list) > maxAddresses {
		return nil, fmt.Errorf("%d addresses: want at most %d", len(list), maxAddresses)
	}
	for _, b := range list {
		a, ok := netip.AddrFromSlice(b)
		if !ok {
			return nil, fmt.Errorf("address of %d bytes: want 4 or 16", len(b))
		}
		all = append(all, a.Unmap())
	}
	return all, nil
}

func encodeNumbers(ports []uint16) (all []uint32) {
	for _, port := range ports {
		all = append(all, uint32(port))
	}
	return all
}

func decodeNumbers(ports []uint32) (all []uint16, err error) {
	for _, port := range ports {
		if port == 0 || port > 65535 {
			return nil, fmt.Errorf("port %d: want 1 to 65535", port)
		}
		all = append(all, uint16(port))
	}
	return all, nil
}

func encodeExclusions(list []mesh.Exclusion) (all []*message.Exclusion) {
	for _, e := range list {
		x := &message.Exclusion{Port: uint32(e.Port)}
		if e.Prefix.IsValid() {
			x.Address, x.Length = e.Prefix.Addr().AsSlice(), uint32(e.Prefix.Bits())
		}
		all = append(all, x)
	}
	return all
}

func decodeExclusions(list []*message.Exclusion) (all []mesh.Exclusion, err error) {
	for _, x := range list {
		e, err := decodeExclusion(x)
		if err != nil {
			return nil, err
		}
		all = append(all, e)
	}
	return all, nil
}

func decodeExclusion(x *message.Exclusion) (mesh.Exclusion, error) {
	if x.GetPort() > 65535 {
		return mesh.Exclusion{}, fmt.Errorf("outbound exclusion of port %d: want 0 to 65535", x.GetPort())
	}
	e := mesh.Exclusion{Port: uint16(x.GetPort())}
	if len(x.GetAddress()) == 0 {
		if e.Port == 0 {
			return e, errors.New("outbound exclusion of every address and every port")
		}
		return e, nil
	}
	a, ok := netip.AddrFromSlice(x.GetAddress())
	if !ok || x.GetLength() > uint32(a.BitLen()) {
		return e, fmt.Errorf("outbound exclusion of %d bytes / %d bits: want an address and its prefix", len(x.GetAddress()), x.GetLength())
	}
	e.Prefix = netip.PrefixFrom(a, int(x.GetLength()))
	return e, nil
}
