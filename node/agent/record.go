package agent

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"time"

	"tacit.dev/mesh"
	"tacit.dev/pod/netns"
)

// A record is what the next agent has to know of a pod: one JSON file each, in
// the folder of the run, for nobody but us. It is written before the kernel is
// changed, so it never promises less than what is there.
type record struct {
	// UID is empty if the runtime does not tell it.
	UID       string       `json:"uid,omitempty"`
	Namespace string       `json:"namespace"`
	Name      string       `json:"name"`
	Container string       `json:"container"`
	Netns     string       `json:"netns"`
	Key       netns.Key    `json:"key"`
	Addresses []netip.Addr `json:"addresses,omitempty"`
	// Found: no runtime has told of it. Its addresses are all that its namespace has.
	Found bool `json:"found,omitempty"`
	// Phase is which rules may be there.
	Phase phase `json:"phase,omitempty"`
	// Word is control's last, nil if it has said nothing yet. It goes on
	// counting while control is away.
	Word *mesh.Pod `json:"word,omitempty"`
}

type phase string

const (
	phaseNone    phase = ""
	phaseCapture phase = "capture"
	phaseDrain   phase = "drain"
)

// rules is what to believe of a pod whose record says p, before it was looked at.
func (p phase) rules() rules {
	switch p {
	case phaseCapture:
		return stale
	case phaseDrain:
		return draining
	}
	return noRules
}

func (a *Agent) recordDir() string { return filepath.Join(a.cfg.RunDir, "pods") }

func (a *Agent) recordFile(key string) string {
	return filepath.Join(a.recordDir(), key+".json")
}

// save writes p's record, whole or not at all. The folder is in memory: this
// does not wait for a disk.
func (a *Agent) save(p *pod) error {
	b, err := json.MarshalIndent(p.rec, "", "\t")
	if err != nil {
		return fmt.Errorf("record of %s: %w", p.key, err)
	}
	file := a.recordFile(p.key)
	if err := os.WriteFile(file+".new", b, 0o600); err != nil {
		return fmt.Errorf("write record: %w", err)
	}
	if err := os.Rename(file+".new", file); err != nil {
		return fmt.Errorf("write record: %w", err)
	}
	return nil
}

// savePhase notes which rules may be there from now on.
func (a *Agent) savePhase(p *pod, ph phase) error {
	if p.rec.Phase == ph {
		return nil
	}
	old := p.rec.Phase
	p.rec.Phase = ph
	if err := a.save(p); err != nil {
		p.rec.Phase = old
		return err
	}
	return nil
}

func (a *Agent) unsave(p *pod) {
	if err := os.Remove(a.recordFile(p.key)); err != nil && !errors.Is(err, os.ErrNotExist) {
		a.cfg.Log.Warn("record not removed", "uid", p.key, "error", err)
	}
}

// recover finds the pods of the last agent's again, on the loop.
func (a *Agent) recover() {
	files, err := filepath.Glob(filepath.Join(a.recordDir(), "*.json"))
	if err != nil {
		a.cfg.Log.Error("records not found", "error", err)
	}
	for _, file := range files {
		if err := a.recoverOne(file); err != nil {
			a.cfg.Log.Warn("pod not found again", "record", file, "error", err)
		}
	}
	if a.recovering == 0 {
		a.looked()
	}
}

func (a *Agent) recoverOne(file string) error {
	b, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	p := &pod{key: strings.TrimSuffix(filepath.Base(file), ".json"), since: time.Now()}
	if err := json.Unmarshal(b, &p.rec); err != nil {
		return fmt.Errorf("read record: %w", err)
	}
	ns, err := openSame(p.rec)
	if errors.Is(err, netns.ErrGone) {
		a.unsave(p) // the pod ended while no agent was there
		return nil
	}
	if err != nil {
		return err
	}
	p.rules = p.rec.Phase.rules()
	if p.rules == noRules {
		ns.Close()
	} else {
		p.ns = ns
		p.recovering = true
		a.recovering++
	}
	a.pods[p.key] = p
	a.cfg.Log.Info("pod found again", p.attrs()...)
	return nil
}

// openSame opens the namespace of a record, and no other one. The error is
// netns.ErrGone if it is not there any more.
func openSame(r record) (*netns.NS, error) {
	ns, err := netns.Open(r.Netns)
	if err != nil {
		return nil, err
	}
	if ns.Key() != r.Key {
		ns.Close()
		return nil, fmt.Errorf("namespace at %s is %d, not %d as before: %w", r.Netns, ns.Inode(), r.Key.Inode, netns.ErrGone)
	}
	return ns, nil
}
