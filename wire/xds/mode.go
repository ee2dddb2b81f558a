package xds

import (
	"tacit.dev/mesh"
	"tacit.dev/wire/xds/message"
)

// modeExtension on a Workload says mesh.Workload.Mode.
const modeExtension = "tacit.dev/mode"

// Read only.
var levels = map[mesh.Level]message.Level{
	mesh.Inherited: message.Level_LEVEL_INHERITED, mesh.Permissive: message.Level_LEVEL_PERMISSIVE, mesh.Strict: message.Level_LEVEL_STRICT,
}

// encodeMode takes one that Check has nothing against.
func encodeMode(m *mesh.Mode) *message.Mode {
	x := &message.Mode{Inbound: levels[m.Inbound], Outbound: levels[m.Outbound], Outside: levels[m.Outside], Allowed: encodeExclusions(m.Allowed)}
	for _, p := range m.Ports {
		x.Ports = append(x.Ports, &message.PortLevel{Port: uint32(p.Port), Level: levels[p.Level]})
	}
	for _, a := range m.Admit {
		one := &message.Admission{Port: uint32(a.Port)}
		for _, r := range a.From {
			one.From = append(one.From, &message.Range{Address: r.Addr().AsSlice(), Length: uint32(r.Bits())})
		}
		x.Admit = append(x.Admit, one)
	}
	return x
}

// modeOf is the mode of a Workload, nil for none. One that cannot be read is strict.
func modeOf(extensions []*message.Extension) *mesh.Mode {
	config := &message.Mode{}
	is, err := extended(extensions, modeExtension, config)
	switch {
	case err != nil:
		return mesh.StrictMode()
	case !is:
		return nil
	}
	return decodeMode(config)
}

// decodeMode never says less than was meant: one that is not understood in full is strict, and
// has no exceptions.
func decodeMode(x *message.Mode) *mesh.Mode {
	m := &mesh.Mode{Inbound: levelOf(x.GetInbound()), Outbound: levelOf(x.GetOutbound()), Outside: levelOf(x.GetOutside())}
	for _, p := range x.GetPorts() {
		if p.GetPort() > 65535 || isForeign(p) {
			return mesh.StrictMode()
		}
		m.Ports = append(m.Ports, mesh.PortLevel{Port: uint16(p.GetPort()), Level: levelOf(p.GetLevel())})
	}
	for _, a := range x.GetAdmit() {
		one, ok := decodeAdmission(a)
		if !ok {
			return mesh.StrictMode()
		}
		m.Admit = append(m.Admit, one)
	}
	var err error
	if m.Allowed, err = decodeExclusions(x.GetAllowed()); err != nil || isForeign(x) || m.Check() != nil {
		return mesh.StrictMode()
	}
	return m
}

// levelOf is strict for what is not known.
func levelOf(x message.Level) mesh.Level {
	for l, is := range levels {
		if is == x {
			return l
		}
	}
	return mesh.Strict
}

func decodeAdmission(x *message.Admission) (a mesh.Admission, ok bool) {
	if x.GetPort() > 65535 || isForeign(x) {
		return a, false
	}
	a.Port = uint16(x.GetPort())
	for _, r := range x.GetFrom() {
		prefixes, err := decodePrefixes([]*message.IPRange{{Address: r.GetAddress(), Length: r.GetLength()}})
		if err != nil {
			return a, false
		}
		a.From = append(a.From, prefixes...)
	}
	return a, true
}
