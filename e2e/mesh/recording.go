package mesh

import (
	"bufio"
	"fmt"
	"io"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
)

// Recording is a witness of everything that passes the cables between the cluster's
// machines, from when it begins: packets are taken at the far ends of the nodes'
// uplinks, also of nodes that are added or reboot meanwhile. What it says is about
// all that passed before it was asked; it fails the test if it missed a packet.
type Recording struct {
	t       testing.TB
	cmd     *exec.Cmd
	answers *bufio.Reader
	said    strings.Builder

	// mu is held by whoever asks.
	mu        sync.Mutex
	questions io.WriteCloser
}

// Record begins a recording, which ends with the test.
func (m *Mesh) Record(t testing.TB) *Recording {
	t.Helper()
	namespace, err := m.Netns("control-plane")
	if err != nil {
		t.Fatal(err)
	}
	r := &Recording{t: t, cmd: exec.Command(m.TacitPath(), "lab", "record", namespace, filepath.Join(t.TempDir(), "wire.pcap"))}
	r.cmd.Stderr = &r.said
	out, err := r.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	r.answers = bufio.NewReader(out)
	if r.questions, err = r.cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	if err := r.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(r.end)
	if said := r.hear(); said != "recording" {
		t.Fatalf("tacit lab record said %q: %s", said, &r.said)
	}
	return r
}

func (r *Recording) end() {
	r.questions.Close()
	if err := r.cmd.Wait(); err != nil {
		r.t.Errorf("the recording: %v: %s", err, &r.said)
	}
}

func (r *Recording) hear() string {
	line, err := r.answers.ReadString('\n')
	if err != nil {
		return err.Error()
	}
	return strings.TrimSpace(line)
}

func (r *Recording) ask(question string, words ...any) (bool, string) {
	r.t.Helper()
	r.mu.Lock()
	defer r.mu.Unlock()
	if _, err := fmt.Fprintf(r.questions, question+"\n", words...); err != nil {
		r.t.Fatalf("ask the recording: %v", err)
	}
	said := r.hear()
	verdict, what, ok := strings.Cut(said, ": ")
	if !ok || verdict != "yes" && verdict != "no" {
		r.t.Fatalf("the recording answered %q to %q: %s", said, fmt.Sprintf(question, words...), &r.said)
	}
	return verdict == "yes", what
}

// Clear fails the test if the text has not passed in clear: markers are looked for
// in vain only where they can be found.
func (r *Recording) Clear(text string) {
	r.t.Helper()
	if yes, what := r.ask("grep %s", text); !yes {
		r.t.Error(what)
	}
}

// Hidden fails the test if one of the texts has passed in clear.
func (r *Recording) Hidden(texts ...string) {
	r.t.Helper()
	for _, text := range texts {
		if yes, what := r.ask("grep %s", text); yes {
			r.t.Error(what)
		}
	}
}

// TLS fails the test unless every connection between the two addresses began with
// a TLS handshake, on one of these ports of the server.
func (r *Recording) TLS(client, server string, ports ...int) {
	r.t.Helper()
	if yes, what := r.ask("tls %s %s", client, server); !yes {
		r.t.Error(what)
	}
	if yes, what := r.ask("ports %s %s %s", client, server, strings.Trim(fmt.Sprint(ports), "[]")); !yes {
		r.t.Error(what)
	}
}
