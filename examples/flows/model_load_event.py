"""A flow that another one's end triggers loads what that one saved: any artifact of its run that holds a reference or a key.

    python -m examples.run model_refresh
    python -m examples.run model_load_event
"""

from metaflow import FlowSpec, step, trigger_on_finish, current, model


@trigger_on_finish(flow='ModelRefreshFlow')
class InferenceFlow(FlowSpec):

    @model
    @step
    def start(self):
        print("Triggering run", current.trigger.run)
        model_path = current.model.load(current.trigger.run.data.model_reference)
        print("Model path", model_path)
        self.next(self.end)

    @step
    def end(self):
        pass


if __name__ == "__main__":
    # An orchestrator says which run it was. A flow that is started by hand has to be told.
    from metaflow import Flow
    from metaflow.events import Trigger

    if "trigger" not in current:
        current._update_env({"trigger": Trigger.from_runs([Flow("ModelRefreshFlow").latest_successful_run])})
    InferenceFlow()
