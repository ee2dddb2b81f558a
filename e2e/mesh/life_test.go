package mesh_test

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"
)

// TestLife is what befalls pods besides being called by other pods. The parts share
// a server on n2 and a client on n1; the CronJob waits for its minute meanwhile.
func TestLife(t *testing.T) {
	s := enrolled(t)
	s.apply("server.yaml", "SERVER", "n2", "CLIENT", "n1")
	s.apply("cron.yaml")
	s.ready("server", "client")
	s.captured("server", "client")
	s.eventually("the first request", func() error { // a pod is ready before it is an endpoint everywhere
		_, err := s.try("exec", "client", "--", "/app", "get", "http://server/")
		return err
	})
	wire := s.Record(t)
	for _, part := range []struct {
		name string
		run  func(space)
	}{
		{"exec, logs, port-forward, debug", execLogsForwardDebug},
		{"scraping from outside of the mesh", scraping},
		{"node ports, host port, load balancer", fromOutside},
		{"hooks", hooks},
		{"rolling update", rollingUpdate},
		{"CronJob", cronJob},
	} {
		t.Run(part.name, func(t *testing.T) { part.run(space{s.Mesh, t, s.name}) })
	}
	wire.TLS(s.address("client"), s.address("server"), 8080)
	wire.Hidden("/probe/started", "/probe/stopping", "/probe/cron")
}

// self is what the server says of itself.
const self = "this is server on n2, you are "

func execLogsForwardDebug(s space) {
	if out := s.exec("client", "/app", "get", "http://server/"); !strings.HasPrefix(out, self+s.address("client")+":") {
		s.t.Errorf("the client heard %q, want %q and its own address", out, self)
	}
	if out := s.kubectl("logs", "server"); !strings.Contains(out, "serving on :8080") {
		s.t.Errorf("logs are %q", out)
	}
	if out := s.throughPortForward("server", "8080"); !strings.HasPrefix(out, self+"127.0.0.1:") {
		s.t.Errorf("through port-forward: %q, want %q", out, self)
	}
	s.kubectl("debug", "client", "--image=tacit.test/app:1", "--container=debugger", "--", "/app", "get", "http://server/")
	s.eventually("the debugger's request", func() error {
		out, err := s.try("logs", "client", "-c", "debugger")
		if err == nil && !strings.HasPrefix(out, self+s.address("client")) {
			err = fmt.Errorf("it heard %q", out)
		}
		return err
	})
}

func (s space) throughPortForward(pod, port string) string {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(s.t.Context(), time.Minute)
	cmd := s.KubectlCommand(ctx, "port-forward", "-n", s.name, "pod/"+pod, ":"+port)
	out, err := cmd.StdoutPipe()
	if err != nil {
		s.t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		s.t.Fatal(err)
	}
	defer func() { cancel(); _ = cmd.Wait() }() // killed: that is no error
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		s.t.Fatal(err)
	}
	address, _, _ := strings.Cut(strings.TrimPrefix(line, "Forwarding from "), " ")
	client := http.Client{Timeout: time.Minute, Transport: &http.Transport{DialContext: (&net.Dialer{}).DialContext, DisableKeepAlives: true}}
	answer, err := client.Get("http://" + address + "/")
	if err != nil {
		s.t.Fatal(err)
	}
	defer answer.Body.Close()
	text, err := io.ReadAll(answer.Body)
	if err != nil {
		s.t.Error(err)
	}
	return string(text)
}

// scraping: a monitoring system that is not in the mesh reads from one that is, at
// the pod's address, and is seen by its own.
func scraping(s space) {
	outside := plain(s.t)
	outside.apply("server.yaml", "SERVER", "n1", "CLIENT", "n1", ", hostPort: 18080", "")
	outside.ready("client")
	want := self + outside.address("client") + ":"
	if out := outside.exec("client", "/app", "get", "http://"+s.address("server")+":8080/"); !strings.HasPrefix(out, want) {
		s.t.Errorf("the scraper heard %q, want %q", out, want)
	}
}

// gateway is a machine outside of the cluster: the control plane's.
const gateway = "control-plane"

// fromOutside: whoever comes from outside of the cluster reaches the server, and is
// seen by his own address where Kubernetes says so.
func fromOutside(s space) {
	s.apply("outside.yaml")
	const me = "172.30.0.1:"
	for _, way := range []struct{ name, url, want string }{
		{"a node port of the server's node", "http://172.30.0.12:30080/", self},
		{"a node port of another node", "http://172.30.0.11:30080/", self},
		{"a load balancer that keeps the address", "http://172.30.0.12:30081/", self + me},
		{"the host port", "http://172.30.0.12:18080/", self + me},
		{"the pod's address", "http://" + s.address("server") + ":8080/", self + me},
	} {
		s.eventually(way.name, func() error {
			out, err := s.Run(s.t.Context(), gateway, "curl", "-sS", "--max-time", "5", way.url)
			if err == nil && !strings.HasPrefix(out, way.want) {
				err = fmt.Errorf("the answer is %q, want %q", out, way.want)
			}
			return err
		})
	}
	if out, err := s.Run(s.t.Context(), gateway, "curl", "-sS", "--max-time", "3", "http://172.30.0.11:30081/"); err == nil {
		s.t.Errorf("a load balancer that keeps the address, at a node without the server: %q, want no answer", out)
	}
	if out := s.exec("client", "/app", "get", "http://172.30.0.11:30080/"); !strings.HasPrefix(out, self) {
		s.t.Errorf("from inside, a node port of another node: %q, want %q", out, self)
	}
	for node, want := range map[string]string{"172.30.0.12": "200", "172.30.0.11": "503"} {
		s.eventually("health of the load balancer's target "+node, func() error {
			got, err := s.Run(s.t.Context(), gateway, "curl", "-sS", "--max-time", "5", "-o", "/dev/null", "-w", "%{http_code}", "http://"+node+":30090/")
			if err == nil && got != want {
				err = fmt.Errorf("it is %s, want %s", got, want)
			}
			return err
		})
	}
}

// hooks: a pod that calls the server in its first moment and in its last, and one
// that the kubelet calls.
func hooks(s space) {
	s.apply("hooks.yaml", "CLIENT", "n1")
	s.ready("hooked", "called")
	s.captured("hooked", "called")
	address := s.address("hooked")
	s.kubectl("delete", "pod", "hooked")
	calls := s.exec("client", "/app", "get", "http://server/probers")
	for _, want := range []string{"started " + address + "\n", "stopping " + address + "\n"} {
		if !strings.Contains(calls, want) {
			s.t.Errorf("the server was called as follows, want %q:\n%s", want, calls)
		}
	}
	if calls := s.exec("called", "/app", "get", "http://127.0.0.1:8080/probers"); !strings.Contains(calls, "called ") {
		s.t.Errorf("the kubelet called as follows, want a call of the hook:\n%s", calls)
	}
	s.kubectl("delete", "pod", "called")
}

// rollingUpdate: every pod is replaced under load, and no request fails.
func rollingUpdate(s space) {
	s.apply("rolling.yaml")
	s.kubectl("rollout", "status", "deployment/rolling", "--timeout=2m")
	s.eventually("the first request", func() error { // rules of a new service may come late
		_, err := s.try("exec", "deployment/rolling", "--", "/tacit", "lab", "app", "connect", "--timeout=2s", "rolling:80")
		return err
	})
	s.apply("load.yaml")
	s.ready("load")
	lastWords := s.follow("load")
	s.kubectl("rollout", "restart", "deployment/rolling")
	s.kubectl("rollout", "status", "deployment/rolling", "--timeout=2m")
	s.eventually("the end of the old pods", func() error {
		names, err := s.try("get", "pods", "-l", "app=rolling", "-o", "name")
		if err == nil && strings.Count(names, "\n") != 2 {
			err = fmt.Errorf("there are\n%s", names)
		}
		return err
	})
	s.kubectl("delete", "pod", "load", "--wait=false")
	said := lastWords()
	if !strings.Contains(said, ", failed 0 ") || strings.HasPrefix(said, "ok 0,") {
		s.t.Errorf("during a rolling update: %s", said)
	}
	s.t.Log(said)
}

// follow reads what a pod says from now on; what it returns waits for the pod's end
// and returns all of it.
func (s space) follow(pod string) func() string {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(s.t.Context(), 6*time.Minute)
	logs := s.KubectlCommand(ctx, "logs", "-n", s.name, "-f", pod)
	var said bytes.Buffer
	logs.Stdout, logs.Stderr = &said, &said
	if err := logs.Start(); err != nil {
		s.t.Fatal(err)
	}
	return func() string {
		defer cancel()
		if err := logs.Wait(); err != nil {
			s.t.Errorf("logs of %s: %v", pod, err)
		}
		return strings.TrimSpace(said.String())
	}
}

func cronJob(s space) {
	s.eventually("the CronJob's first job", func() error {
		out, err := s.try("get", "jobs", "-o", "jsonpath={.items[*].status.conditions[*].type}")
		if err == nil && !strings.Contains(out, "Complete") {
			err = fmt.Errorf("jobs are %q, want one Complete", out)
		}
		return err
	})
	if calls := s.exec("client", "/app", "get", "http://server/probers"); !strings.Contains(calls, "cron 10.244.") {
		s.t.Errorf("the server was called as follows, want one by the job:\n%s", calls)
	}
}
