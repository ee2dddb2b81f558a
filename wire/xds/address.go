package xds

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"tacit.dev/mesh"
	"tacit.dev/wire/xds/message"
)

const (
	addressType = "type.googleapis.com/istio.workload.Address"

	// directExtension on a Workload says mesh.Workload.Direct. Istio's own
	// clients skip an extension that they do not know.
	directExtension = "tacit.dev/direct"
	// enrolledExtension says mesh.Workload.Enrolled of who is not direct. It has
	// no configuration.
	enrolledExtension = "tacit.dev/enrolled"

	// What Istio leaves empty on the wire.
	defaultTrustDomain    = "cluster.local"
	defaultServiceAccount = "default"
	defaultCluster        = "Kubernetes"

	// maxName bounds the name of a resource; Kubernetes allows 253 for each part.
	maxName = 1024
)

func encodeWorkload(w *mesh.Workload) (*message.Address, error) {
	if w.Direct && (w.ID.IsZero() || w.ID.Namespace != w.Namespace) {
		return nil, fmt.Errorf("direct with identity %q in namespace %q", w.ID, w.Namespace)
	}
	if err := checkPolicies(w.Policies); err != nil {
		return nil, err
	}
	addresses, err := encodeAddrs(w.Addresses)
	if err != nil {
		return nil, err
	}
	kind, ok := workloadTypes[w.OwnerKind]
	if !ok && w.OwnerKind != "" {
		return nil, fmt.Errorf("owner kind %q: want deployment, cronjob, pod or job", w.OwnerKind)
	}
	m := &message.Workload{
		Uid: w.UID, Name: w.Name, Namespace: w.Namespace, Node: w.Node, ClusterId: w.Cluster,
		Addresses: addresses, TrustDomain: w.ID.TrustDomain, ServiceAccount: w.ID.ServiceAccount,
		WorkloadName: w.OwnerName, WorkloadType: kind,
		CanonicalName: w.CanonicalName, CanonicalRevision: w.CanonicalRevision,
		Services: encodeServices(w.Services), AuthorizationPolicies: w.Policies,
	}
	if w.Zone != "" {
		m.Locality = &message.Locality{Zone: w.Zone}
	}
	if !w.Ready {
		m.Status = message.WorkloadStatus_UNHEALTHY
	}
	if w.HostNetwork {
		m.NetworkMode = message.NetworkMode_HOST_NETWORK
	}
	switch {
	case w.Direct:
		e, err := encodeDirect(w)
		if err != nil {
			return nil, err
		}
		m.Extensions = []*message.Extension{e}
	case w.Enrolled:
		m.Extensions = []*message.Extension{{Name: enrolledExtension}}
	}
	return encodeMore(m, w)
}

// encodeMore adds what only some workloads have.
func encodeMore(m *message.Workload, w *mesh.Workload) (*message.Address, error) {
	if len(w.HostPorts) > 0 {
		e, err := encodeHostPorts(w.HostPorts)
		if err != nil {
			return nil, err
		}
		m.Extensions = append(m.Extensions, e)
	}
	if w.Mode != nil {
		if err := w.Mode.Check(); err != nil {
			return nil, err
		}
		e, err := newExtension(modeExtension, encodeMode(w.Mode))
		if err != nil {
			return nil, err
		}
		m.Extensions = append(m.Extensions, e)
	}
	if w.Listed {
		e, err := newExtension(listedExtension, &message.Listed{Of: w.Of})
		if err != nil {
			return nil, err
		}
		m.Extensions = append(m.Extensions, e)
		m.NetworkMode = message.NetworkMode_HOST_NETWORK
	}
	return &message.Address{Type: &message.Address_Workload{Workload: m}}, nil
}

func encodeDirect(w *mesh.Workload) (*message.Extension, error) {
	return newExtension(directExtension, &message.Direct{
		ExcludeInbound: encodeNumbers(w.ExcludeInbound), ExcludeOutbound: encodeExclusions(w.ExcludeOutbound),
		MarkedPorts: w.MarkedPorts})
}

func encodeService(s *mesh.Service) (*message.Address, error) {
	m := &message.Service{Name: s.Name, Namespace: s.Namespace, Hostname: s.Hostname, Ports: encodePorts(s.Ports), LoadBalancing: encodeReach(s.Reach)}
	if s.Affinity > 0 {
		e, err := encodeAffinity(s.Affinity)
		if err != nil {
			return nil, err
		}
		m.Extensions = []*message.Extension{e}
	}
	external, err := encodeExternal(s)
	if err != nil {
		return nil, err
	}
	if external != nil {
		m.Extensions = append(m.Extensions, external)
	}
	addresses, err := encodeAddrs(s.Addresses)
	if err != nil {
		return nil, err
	}
	for _, a := range addresses {
		m.Addresses = append(m.Addresses, &message.NetworkAddress{Address: a})
	}
	return &message.Address{Type: &message.Address_Service{Service: m}}, nil
}

// decodeAddress gives the resource's name and a *mesh.Workload, *mesh.Place or
// *mesh.Service.
func decodeAddress(m *message.Address) (name string, v any, err error) {
	switch t := m.GetType().(type) {
	case *message.Address_Workload:
		p, err := decodePlace(t.Workload)
		if err != nil {
			return "", nil, err
		}
		if p != nil {
			return p.Name, p, nil
		}
		w, err := decodeWorkload(t.Workload)
		if err != nil {
			return "", nil, err
		}
		return w.UID, w, nil
	case *message.Address_Service:
		s, err := decodeService(t.Service)
		if err != nil {
			return "", nil, err
		}
		return s.Key(), s, nil
	}
	return "", nil, errors.New("neither workload nor service")
}

func decodeWorkload(m *message.Workload) (*mesh.Workload, error) {
	excluded, listed := &message.Direct{}, &message.Listed{}
	direct, err := extended(m.GetExtensions(), directExtension, excluded)
	if err != nil {
		return nil, err
	}
	isListed, err := extended(m.GetExtensions(), listedExtension, listed)
	if err != nil {
		return nil, err
	}
	var id mesh.ID // nobody's, for an address that a service lists
	if !isListed {
		if id, err = decodeIdentity(m, direct); err != nil {
			return nil, err
		}
	}
	if m.GetUid() == "" || direct && isListed {
		return nil, fmt.Errorf("workload %q, direct %v, listed %v: want a uid, and not both", m.GetUid(), direct, isListed)
	}
	kind, ok := ownerKinds[m.GetWorkloadType()]
	if !ok {
		return nil, fmt.Errorf("workload type %d is unknown", m.GetWorkloadType())
	}
	w := &mesh.Workload{
		UID: m.GetUid(), Name: m.GetName(), Namespace: m.GetNamespace(), Node: m.GetNode(), Zone: m.GetLocality().GetZone(), ID: id,
		Direct: direct, Enrolled: direct || isEnrolled(m.GetExtensions()),
		HostNetwork: !isListed && m.GetNetworkMode() == message.NetworkMode_HOST_NETWORK,
		Listed:      isListed, Of: listed.GetOf(),
		Ready:     m.GetStatus() == message.WorkloadStatus_HEALTHY,
		OwnerName: m.GetWorkloadName(), OwnerKind: kind, Cluster: or(m.GetClusterId(), defaultCluster),
		CanonicalName: m.GetCanonicalName(), CanonicalRevision: m.GetCanonicalRevision(), Policies: m.GetAuthorizationPolicies(),
	}
	if err := checkPolicies(w.Policies); err != nil {
		return nil, err
	}
	if w.Addresses, err = decodeAddrs(m.GetAddresses()); err != nil {
		return nil, err
	}
	if w.Services, err = decodeServices(m.GetServices()); err != nil {
		return nil, err
	}
	if w.HostPorts, err = decodeHostPorts(m.GetExtensions()); err != nil {
		return nil, err
	}
	if w.ExcludeInbound, err = decodeNumbers(excluded.GetExcludeInbound()); err != nil {
		return nil, err
	}
	w.MarkedPorts, w.Mode = excluded.GetMarkedPorts(), modeOf(m.GetExtensions())
	w.ExcludeOutbound, err = decodeExclusions(excluded.GetExcludeOutbound())
	return w, err
}

func checkPolicies(names []string) error {
	if len(names) > mesh.MaxPoliciesOf || slices.ContainsFunc(names, func(n string) bool { return n == "" || len(n) > maxName }) {
		return fmt.Errorf("workload names %d policies: want at most %d, with names of 1 to %d bytes", len(names), mesh.MaxPoliciesOf, maxName)
	}
	return nil
}

// isEnrolled looks for the extension that says that a workload may be captured.
func isEnrolled(extensions []*message.Extension) bool {
	return slices.ContainsFunc(extensions, func(e *message.Extension) bool { return e.GetName() == enrolledExtension })
}

// decodeIdentity fills in Istio's defaults, but not for a workload that is to be
// reached by direct: whom to expect there must be said, not guessed.
func decodeIdentity(m *message.Workload, direct bool) (mesh.ID, error) {
	if direct && (m.GetTrustDomain() == "" || m.GetServiceAccount() == "") {
		return mesh.ID{}, errors.New("direct without an identity of its own")
	}
	return mesh.ParseID(mesh.ID{
		TrustDomain:    or(m.GetTrustDomain(), defaultTrustDomain),
		Namespace:      m.GetNamespace(),
		ServiceAccount: or(m.GetServiceAccount(), defaultServiceAccount),
	}.String())
}

func decodeService(m *message.Service) (*mesh.Service, error) {
	if m.GetNamespace() == "" || m.GetHostname() == "" {
		return nil, fmt.Errorf("service of namespace %q and hostname %q: want both", m.GetNamespace(), m.GetHostname())
	}
	s := &mesh.Service{Namespace: m.GetNamespace(), Name: m.GetName(), Hostname: m.GetHostname(), Reach: decodeReach(m.GetLoadBalancing())}
	var raw [][]byte
	for _, a := range m.GetAddresses() {
		raw = append(raw, a.GetAddress())
	}
	var err error
	if s.Addresses, err = decodeAddrs(raw); err != nil {
		return nil, err
	}
	if s.Affinity, err = decodeAffinity(m.GetExtensions()); err != nil {
		return nil, err
	}
	if err = decodeExternal(s, m.GetExtensions()); err != nil {
		return nil, err
	}
	s.Ports, err = decodePorts(m.GetPorts(), true)
	return s, err
}

func encodeAddrs(addrs []netip.Addr) ([][]byte, error) {
	var out [][]byte
	for _, a := range addrs {
		if !a.IsValid() || a.Zone() != "" {
			return nil, fmt.Errorf("address %q: want IPv4 or IPv6 without a zone", a)
		}
		out = append(out, a.Unmap().AsSlice())
	}
	return out, nil
}

func decodeAddrs(raw [][]byte) ([]netip.Addr, error) {
	var out []netip.Addr
	for _, b := range raw {
		a, ok := netip.AddrFromSlice(b)
		if !ok {
			return nil, fmt.Errorf("address of %d bytes: want 4 or 16", len(b))
		}
		out = append(out, a.Unmap())
	}
	return out, nil
}

func encodeServices(services map[string][]mesh.Port) map[string]*message.PortList {
	if len(services) == 0 {
		return nil
	}
	out := make(map[string]*message.PortList, len(services))
	for key, ports := range services {
		out[key] = &message.PortList{Ports: encodePorts(ports)}
	}
	return out
}

func decodeServices(services map[string]*message.PortList) (map[string][]mesh.Port, error) {
	if len(services) == 0 {
		return nil, nil
	}
	out := make(map[string][]mesh.Port, len(services))
	for key, list := range services {
		ports, err := decodePorts(list.GetPorts(), false)
		if err != nil {
			return nil, fmt.Errorf("service %q: %w", key, err)
		}
		out[key] = ports
	}
	return out, nil
}

func encodePorts(ports []mesh.Port) []*message.Port {
	var out []*message.Port
	for _, p := range ports {
		out = append(out, &message.Port{ServicePort: uint32(p.Service), TargetPort: uint32(p.Target)})
	}
	return out
}

// decodePorts takes a target of 0, that is a named one, only of a service; of a
// workload it would be dialled.
func decodePorts(ports []*message.Port, named bool) ([]mesh.Port, error) {
	var out []mesh.Port
	for _, p := range ports {
		s, t := p.GetServicePort(), p.GetTargetPort()
		if s == 0 || s > 65535 || t > 65535 || t == 0 && !named {
			return nil, fmt.Errorf("port %d to %d: want 1 to 65535", s, t)
		}
		out = append(out, mesh.Port{Service: uint16(s), Target: uint16(t)})
	}
	return out, nil
}

func or(s, otherwise string) string {
	if s == "" {
		return otherwise
	}
	return s
}

// Read only.
var (
	workloadTypes = map[string]message.WorkloadType{
		"deployment": message.WorkloadType_DEPLOYMENT,
		"cronjob":    message.WorkloadType_CRONJOB,
		"pod":        message.WorkloadType_POD,
		"job":        message.WorkloadType_JOB,
	}
	ownerKinds = map[message.WorkloadType]string{
		message.WorkloadType_DEPLOYMENT: "deployment",
		message.WorkloadType_CRONJOB:    "cronjob",
		message.WorkloadType_POD:        "pod",
		message.WorkloadType_JOB:        "job",
	}
)
