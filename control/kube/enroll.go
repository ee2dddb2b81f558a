package kube

import (
	"fmt"
	"net/netip"
	"strconv"
	"strings"

	"tacit.dev/mesh"
)

// What users write on namespaces and pods.
const (
	// LabelMesh says on or off; of a pod it counts more than of its namespace.
	LabelMesh = "tacit.dev/mesh"
	// LabelIstio says ambient or none, and means the same. LabelMesh beside it
	// counts more.
	LabelIstio = "istio.io/dataplane-mode"
	// AnnotationExcludeOutbound lists destinations of a pod that are not
	// captured: ADDRESS, PREFIX, PORT, ADDRESS:PORT or [PREFIX]:PORT, separated
	// by commas.
	AnnotationExcludeOutbound = "tacit.dev/exclude-outbound"
	// AnnotationExcludeInbound lists ports of a pod that are not captured.
	AnnotationExcludeInbound = "tacit.dev/exclude-inbound-ports"
)

// maxExclusions bounds each of the two annotations: every entry is a rule that
// each new connection of the pod passes.
const maxExclusions = 64

// wanted tells whether a pod should be enrolled. A label that says something
// else counts as if it were not there.
func (r *reader) wanted(p *PodObject) bool {
	if r.system(p.Namespace) {
		r.except(p.Namespace, p.Name, SystemNamespace)
		return false
	}
	has := r.around.labels(p.Namespace)
	usual, said := r.label(has, "Namespace", "", p.Namespace)
	if !said {
		usual = r.policy.wants(p.Namespace, has)
	}
	on, said := r.label(p.Labels, "Pod", p.Namespace, p.Name)
	switch {
	case r.policy.Enrollment == None:
		return false
	case !said:
		return usual
	case !on && usual:
		r.except(p.Namespace, p.Name, OptedOut)
	}
	return on
}

// enrolls tells whether the pod may have to be enrolled.
func (r *reader) enrolls(p *PodObject) bool { return !p.Spec.HostNetwork && r.quiet().wanted(p) }

// enrollsIn tells whether a pod without a label would have to be enrolled in a namespace.
func (r *reader) enrollsIn(namespace string) bool {
	var unlabeled PodObject
	unlabeled.Namespace = namespace
	return r.quiet().wanted(&unlabeled)
}

func (r *reader) label(labels map[string]string, kind, namespace, name string) (on, said bool) {
	for _, l := range []struct{ key, on, off, enabled, disabled string }{
		{LabelMesh, "on", "off", "enabled", "disabled"}, // the words that YAML 1.1 takes for booleans, and those that it does not
		{LabelIstio, "ambient", "none", "ambient", "none"},
	} {
		switch v, ok := labels[l.key]; {
		case !ok:
		case v == l.on, v == l.enabled:
			return true, true
		case v == l.off, v == l.disabled:
			return false, true
		default:
			r.problem(kind, namespace, name, fmt.Sprintf("label %s: %.80q: want %q or %q", l.key, v, l.on, l.off))
		}
	}
	return false, false
}

// parseOutbound reads AnnotationExcludeOutbound. What it cannot read stays
// captured, and is told in bad.
func parseOutbound(text string) (list []mesh.Exclusion, bad []string) {
	return parseList(text, "ADDRESS, PREFIX, PORT, ADDRESS:PORT or [PREFIX]:PORT", parseExclusion)
}

// parseList reads an annotation. Of one that is too long nothing is heeded: what its author
// meant is not known.
func parseList[T any](text, want string, parse func(string) (T, bool)) (list []T, bad []string) {
	if len(text) > maxAnnotation {
		return nil, []string{fmt.Sprintf("it has more than %d bytes: nothing of it is heeded", maxAnnotation)}
	}
	var f faults
	for _, s := range fields(text) {
		v, ok := parse(s)
		switch {
		case !ok:
			f.add("%.80q: want %s", s, want)
		case len(list) == maxExclusions:
			f.add("%.80q: more than %d exclusions", s, maxExclusions)
		default:
			list = append(list, v)
		}
	}
	return list, f.told()
}

func parseExclusion(s string) (mesh.Exclusion, bool) {
	if p, ok := parsePort(s); ok {
		return mesh.Exclusion{Port: p}, true
	}
	if prefix, ok := parsePrefix(s); ok {
		return mesh.Exclusion{Prefix: prefix}, true
	}
	i := strings.LastIndexByte(s, ':')
	if i < 0 {
		return mesh.Exclusion{}, false
	}
	port, ok := parsePort(s[i+1:])
	if !ok {
		return mesh.Exclusion{}, false
	}
	host := s[:i]
	if in, ok := strings.CutPrefix(host, "["); ok {
		if host, ok = strings.CutSuffix(in, "]"); !ok {
			return mesh.Exclusion{}, false
		}
	} else if strings.Contains(host, ":") { // fd00::1:80 is an address, or nothing
		return mesh.Exclusion{}, false
	}
	prefix, ok := parsePrefix(host)
	return mesh.Exclusion{Prefix: prefix, Port: port}, ok
}

func parsePrefix(s string) (netip.Prefix, bool) {
	if a, err := netip.ParseAddr(s); err == nil && a.Zone() == "" {
		a = a.Unmap()
		return netip.PrefixFrom(a, a.BitLen()), true
	}
	p, err := netip.ParsePrefix(s)
	if err != nil || p.Addr().Is4In6() {
		return netip.Prefix{}, false
	}
	return p.Masked(), true
}

// parsePorts reads AnnotationExcludeInbound.
func parsePorts(text string) (list []uint16, bad []string) {
	return parseList(text, "a port", parsePort)
}

func parsePort(s string) (uint16, bool) {
	p, err := strconv.ParseUint(s, 10, 16)
	return uint16(p), err == nil && p != 0
}

func fields(text string) []string {
	return strings.FieldsFunc(text, func(r rune) bool { return r == ',' || r == ' ' || r == '\t' || r == '\n' })
}
