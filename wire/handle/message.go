package handle

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"

	"tacit.dev/mesh"
)

const (
	// MaxMessage bounds the JSON of one message, in bytes.
	MaxMessage = 64 << 10
	// MaxFiles bounds the descriptors that come with one message; the kernel takes
	// no more than 253 (SCM_MAX_FD).
	MaxFiles = 250
	// MaxCount bounds how many sockets one need may ask for.
	MaxCount = 1024

	maxText = 1024 // bytes of a reason or name
)

// Kind says what a message asks for or tells; see the package comment.
type Kind string

const (
	Held    Kind = "held"
	Hello   Kind = "hello"
	Pod     Kind = "pod"
	Ready   Kind = "ready"
	Failed  Kind = "failed"
	Need    Kind = "need"
	Sockets Kind = "sockets"
	Ports   Kind = "ports"
	Bind    Kind = "bind"
	Bound   Kind = "bound"
	Drain   Kind = "drain"
	Drained Kind = "drained"
	Remove  Kind = "remove"
	Yield   Kind = "yield"
	Take    Kind = "take"
	Given   Kind = "given"
	Done    Kind = "done"
)

// Role names a listener of a pod. Files of a Held or Pod message come in the
// order of Message.Roles.
type Role string

const (
	Outbound4 Role = "outbound4"
	Outbound6 Role = "outbound6"
	Inbound4  Role = "inbound4"
	Inbound6  Role = "inbound6"
)

// Inbound reports whether connections from the network arrive there; otherwise
// they come from the application.
func (r Role) Inbound() bool { return r == Inbound4 || r == Inbound6 }

// Message is one message. Fields that its Kind does not name are empty.
type Message struct {
	Kind Kind `json:"kind"`
	// UID is the pod's; with every kind but Hello, Take, Given and Done.
	UID string `json:"uid,omitempty"`
	// Pod comes with kind Pod; its UID is the message's.
	Pod *PodInfo `json:"pod,omitempty"`
	// Roles says what the files of Pod and Held are, one each.
	Roles []Role `json:"roles,omitempty"`
	// Family is 4 or 6, with Need and Sockets.
	Family int `json:"family,omitempty"`
	// Count is how many sockets are asked for (Need) or come with it (Sockets).
	Count int `json:"count,omitempty"`
	// Ports are the first and the last port that the pod's kernel gives to those who ask for
	// none, with Ports.
	Ports [2]uint16 `json:"ports,omitzero"`
	// Source is the address and port to be bound, with Bind and Bound. It is not mapped.
	Source netip.AddrPort `json:"source,omitzero"`
	// Reason is for people, with Failed, an empty Sockets and an empty Bound.
	Reason string `json:"reason,omitempty"`
}

// PodInfo is what the proxy has to know of a pod of its node.
type PodInfo struct {
	UID       string `json:"uid"`
	Namespace string `json:"namespace"`
	Name      string `json:"name"`
	// ID is the text of a mesh.ID; it parses, or the message is refused.
	ID string `json:"id"`
	// Addresses are the pod's own, none mapped (::ffff:…).
	Addresses []netip.Addr `json:"addresses"`
}

// encode checks m and the number of its files, and writes it.
func encode(m Message, files int) ([]byte, error) {
	if err := m.check(files); err != nil {
		return nil, err
	}
	b, err := json.Marshal(m)
	if err != nil {
		return nil, fmt.Errorf("encode %s message: %w", m.Kind, err)
	}
	if len(b) > MaxMessage {
		return nil, fmt.Errorf("%s message of %d bytes: at most %d", m.Kind, len(b), MaxMessage)
	}
	return b, nil
}

// decode reads what encode wrote, and believes nothing.
func decode(b []byte, files int) (Message, error) {
	var m Message
	if err := json.Unmarshal(b, &m); err != nil {
		return Message{}, fmt.Errorf("decode message of %d bytes: %w", len(b), err)
	}
	if err := m.check(files); err != nil {
		return Message{}, err
	}
	return m, nil
}

func (m *Message) check(files int) error {
	if files > MaxFiles {
		return fmt.Errorf("%q message with %d files: at most %d", clip(string(m.Kind)), files, MaxFiles)
	}
	if len(m.Reason) > maxText || len(m.UID) > maxText {
		return fmt.Errorf("%q message: text of more than %d bytes", clip(string(m.Kind)), maxText)
	}
	switch m.Kind {
	case Hello, Take, Done:
		return m.checkFiles(files, 0)
	case Given:
		return m.checkFiles(files, 1)
	}
	if m.UID == "" {
		return fmt.Errorf("%q message without uid", clip(string(m.Kind)))
	}
	switch m.Kind {
	case Pod:
		return errors.Join(m.Pod.check(m.UID), m.checkRoles(files))
	case Held:
		return m.checkRoles(files)
	case Need:
		return errors.Join(m.checkCount(), m.checkFiles(files, 0))
	case Sockets:
		return errors.Join(m.checkCount(), m.checkFiles(files, m.Count))
	case Ports:
		return errors.Join(m.checkPorts(), m.checkFiles(files, 0))
	case Bind:
		return errors.Join(m.checkSource(), m.checkFiles(files, 0))
	case Bound:
		return errors.Join(m.checkSource(), m.checkFiles(files, min(files, 1)))
	case Ready, Failed, Drain, Drained, Remove, Yield:
		return m.checkFiles(files, 0)
	}
	return fmt.Errorf("message of unknown kind %q", clip(string(m.Kind)))
}

func (m *Message) checkFiles(have, want int) error {
	if have != want {
		return fmt.Errorf("%s message of %s with %d files: want %d", m.Kind, m.UID, have, want)
	}
	return nil
}

func (m *Message) checkRoles(files int) error {
	seen := make(map[Role]bool, 4)
	for _, r := range m.Roles {
		switch r {
		case Outbound4, Outbound6, Inbound4, Inbound6:
		default:
			return fmt.Errorf("%s message of %s: unknown role %q", m.Kind, m.UID, clip(string(r)))
		}
		if seen[r] {
			return fmt.Errorf("%s message of %s: role %s twice", m.Kind, m.UID, r)
		}
		seen[r] = true
	}
	return m.checkFiles(files, len(m.Roles))
}

func (m *Message) checkCount() error {
	if m.Family != 4 && m.Family != 6 {
		return fmt.Errorf("%s message of %s: family %d: want 4 or 6", m.Kind, m.UID, m.Family)
	}
	if m.Count < 0 || m.Count > MaxCount {
		return fmt.Errorf("%s message of %s: count %d: want 0 to %d", m.Kind, m.UID, m.Count, MaxCount)
	}
	return nil
}

func (m *Message) checkPorts() error {
	if first, last := m.Ports[0], m.Ports[1]; first == 0 || first > last {
		return fmt.Errorf("%s message of %s: ports %d to %d", m.Kind, m.UID, first, last)
	}
	return nil
}

func (m *Message) checkSource() error {
	if !CanBind(m.Source) {
		return fmt.Errorf("%s message of %s: source %s: want address and port of a client", m.Kind, m.UID, m.Source)
	}
	return nil
}

// CanBind reports whether a Bind may ask for source: it may be the address of a client that
// is elsewhere.
func CanBind(source netip.AddrPort) bool {
	a := source.Addr()
	return source.Port() != 0 && a.IsGlobalUnicast() && !a.Is4In6() && a.Zone() == ""
}

func (p *PodInfo) check(uid string) error {
	if p == nil || p.UID != uid {
		return fmt.Errorf("pod message of %s: want its facts", uid)
	}
	if len(p.Namespace) > maxText || len(p.Name) > maxText {
		return fmt.Errorf("pod message of %s: text of more than %d bytes", uid, maxText)
	}
	if _, err := mesh.ParseID(p.ID); err != nil {
		return fmt.Errorf("pod message of %s: %w", uid, err)
	}
	for _, a := range p.Addresses {
		if !a.IsValid() || a.Is4In6() {
			return fmt.Errorf("pod message of %s: address %q: want a plain IPv4 or IPv6 address", uid, a)
		}
	}
	return nil
}

// clip keeps what a stranger sent short enough for a log.
func clip(s string) string {
	if len(s) > 64 {
		return s[:64] + "…"
	}
	return s
}
