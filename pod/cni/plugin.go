package cni

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"time"
)

// Plugin is the program tacit-cni.
type Plugin struct {
	// Env is os.Getenv.
	Env    func(string) string
	Stdin  io.Reader
	Stdout io.Writer
	Stderr io.Writer
}

// Run does what CNI_COMMAND asks for, prints the result or the error as CNI
// wants it, and returns the exit code.
func (p Plugin) Run(ctx context.Context) int {
	if Command(p.Env("CNI_COMMAND")) == Version {
		return p.version()
	}
	c, e := readConfig(p.Stdin)
	if e == nil {
		e = p.do(ctx, c)
	}
	if e != nil {
		e.CNIVersion = c.CNIVersion
		p.print(e)
		return 1
	}
	return 0
}

func (p Plugin) version() int {
	p.print(struct {
		CNIVersion        string   `json:"cniVersion"`
		SupportedVersions []string `json:"supportedVersions"`
	}{"1.1.0", versions()})
	return 0
}

func (p Plugin) do(ctx context.Context, c config) *Error {
	if Command(p.Env("CNI_COMMAND")) == GC {
		return nil // the agent sees by itself when a namespace is gone
	}
	r, e := request(p.Env, c)
	if e != nil {
		return e
	}
	ctx, cancel := context.WithTimeout(ctx, c.timeout)
	defer cancel()
	answer, err := Ask(ctx, c.Agent, r)
	if err != nil {
		return p.unanswered(r, err)
	}
	if answer.Error == nil && r.Command == Add {
		p.printRaw(c.PrevResult)
	}
	return answer.Error
}

// unanswered decides what an absent agent means. Nothing may begin without it.
// But a pod may end: nothing of it is left once its namespace is gone, and the
// agent notices that when it is back.
func (p Plugin) unanswered(r Request, err error) *Error {
	switch r.Command {
	case Del:
		fmt.Fprintf(p.Stderr, "tacit-cni: DEL of %s/%s without the agent, which will clean up when it is back: %v\n", r.Namespace, r.Name, err)
		return nil
	case Status:
		return fault(CodeNotReady, "the tacit agent of this node does not answer", err)
	}
	return fault(CodeTryAgain, "the tacit agent of this node does not answer, so the pod cannot be protected and is not started", err)
}

func (p Plugin) print(v any) {
	b, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		fmt.Fprintf(p.Stderr, "tacit-cni: %v\n", err)
		return
	}
	p.printRaw(b)
}

func (p Plugin) printRaw(b []byte) {
	if _, err := p.Stdout.Write(append(b[:len(b):len(b)], '\n')); err != nil {
		fmt.Fprintf(p.Stderr, "tacit-cni: write the result: %v\n", err)
	}
}

// answerMargin is how much earlier than the plugin the agent gives up, so that
// its reason is heard.
const answerMargin = 500 * time.Millisecond

// Patience is how long the agent may work on r.
func (r *Request) Patience() time.Duration {
	t := r.Timeout
	if t <= 0 {
		t = DefaultTimeout
	}
	return max(t-answerMargin, t/2)
}
